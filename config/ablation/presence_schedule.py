# PRESENCE, schedule: tau falls from 1 to -1 along a cosine.
# It comes after config/ablation/base.py.
out_dir = 'out/presence_schedule'
batch_size = 4                  # 8 micro-batches in a step on one GPU
presence = 'store'
presence_schedule = 'cosine'
