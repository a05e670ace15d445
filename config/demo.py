# The demo: a MobileLLM of 3.15M parameters on four sources, 1.0M tokens.
# python train.py config/demo.py
# It takes 2.5 minutes on two cores with bf16 instructions, 4.5 minutes or more without them, and
# 0.55 to 0.7 GB. The validation loss starts at 8.33 = ln(4096) and ends at 5.0 for code, 5.7 for
# docs, 2.6 for math, 6.7 for noise and 4.8 for the mixture, in nats per token (seed 1337, fp32).
# Expect 4.7 to 5.3 for the mixture. docs and noise vary most, because they contain the READMEs of
# the installed packages.
out_dir = 'out/demo'
data_dir = 'data/demo'
prepare = 'prepare/demo.py'
sources = {'code': 0.35, 'docs': 0.3, 'math': 0.25, 'noise': 0.1}

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
