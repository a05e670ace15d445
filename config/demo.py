# The demo: a 3.1M-parameter MobileLLM on four sources, about 1M tokens, a few minutes on two CPU cores.
# python train.py config/demo.py
out_dir = 'out/demo'
data_dir = 'data/demo'
prepare = 'prepare/demo.py'
sources = {'code': 0.3, 'docs': 0.3, 'math': 0.3, 'noise': 0.1}

vocab_size = 4096
n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 192
ffn_dim = 512
rope_theta = 10000.0

block_size = 256
batch_size = 4
total_batch_tokens = 1024
max_steps = 1000
learning_rate = 1.5e-3
warmup_steps = 50
min_lr_frac = 0.05

log_interval = 10
eval_interval = 200
eval_rows = 64
save_interval = 500
sample_tokens = 80
sample_prompt = 'Problem: Compute 12 * 7 + 5.'
