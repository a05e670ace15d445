# PRESENCE, direct: micro-batches that are new to the model count more.
# It comes after config/ablation/base.py.
out_dir = 'out/presence_direct'
batch_size = 4                  # 8 micro-batches in a step on one GPU
presence = 'store'
presence_tau = 1.0
