# The influence ablation, arm A: smollm2_135m, stage-2 sources, 5000 steps of 32 rows, the start weights kept.
# python train.py config/model/smollm2_135m.py config/ablation/influence_fixed.py. Not run yet: no figure to expect.
out_dir = 'out/influence_fixed'
sources = {'dclm': 0.25, 'fineweb_edu': 0.30, 'github_code': 0.15, 'finemath': 0.15, 'slimpajama': 0.15}
mixture = 'fixed'
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}      # its loss is logged
block_size = 2048
batch_size = 8
total_batch_tokens = 32 * 2048
max_steps = 5000
learning_rate = 4e-3
warmup_steps = 250
eval_interval = 250
save_interval = 1000
