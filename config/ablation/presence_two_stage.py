# The self-influence ablation (PRESENCE), two_stage: the published method: tau 1 for the first tenth of the steps, then -1.
# smollm2_135m, stage-2 sources with fixed weights, 5000 steps of 8 micro-batches of 4 rows (on one GPU). Not run yet: no figure to expect.
# python train.py config/model/smollm2_135m.py config/ablation/presence_two_stage.py
out_dir = 'out/presence_two_stage'
sources = {'dclm': 0.25, 'fineweb_edu': 0.30, 'github_code': 0.15, 'finemath': 0.15, 'slimpajama': 0.15}
presence = 'store'
presence_tau = 1.0
presence_schedule = 'two_stage'
block_size = 2048
batch_size = 4
total_batch_tokens = 32 * 2048
max_steps = 5000
learning_rate = 4e-3
warmup_steps = 250
eval_interval = 250
save_interval = 1000
