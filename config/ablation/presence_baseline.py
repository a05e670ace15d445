# PRESENCE, the baseline: micro-batches have equal weights.
# It comes after config/ablation/base.py.
out_dir = 'out/presence_baseline'
batch_size = 4                  # 8 micro-batches in a step on one GPU
presence = 'off'
