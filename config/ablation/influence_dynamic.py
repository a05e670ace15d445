# The influence ablation, arm B: as influence_fixed.py, the weights re-computed every 250 steps from the influence of every
# source on the probe sets, which prepare/probe.py makes.
# python train.py config/model/smollm2_135m.py config/ablation/influence_dynamic.py
out_dir = 'out/influence_dynamic'
sources = {'dclm': 0.25, 'fineweb_edu': 0.30, 'github_code': 0.15, 'finemath': 0.15, 'slimpajama': 0.15}
mixture = 'influence'
mixture_interval = 250
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}
probe_rows = 67                  # about 200 in all
block_size = 2048
batch_size = 8
total_batch_tokens = 32 * 2048
max_steps = 5000
learning_rate = 4e-3
warmup_steps = 250
eval_interval = 250
save_interval = 1000
