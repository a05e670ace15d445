# PRESENCE, two stages, as published: tau is 1 for the first tenth of the steps, then -1.
# It comes after config/ablation/base.py.
out_dir = 'out/presence_two_stage'
batch_size = 4                  # 8 micro-batches in a step on one GPU
presence = 'store'
presence_schedule = 'two_stage'
