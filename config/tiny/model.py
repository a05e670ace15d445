# All stages on a laptop: a model of 1.3M parameters and the demo's data. Each takes a minute or two
# on two CPU cores. config/tiny/teacher.py comes before stage 3.
#     for s in 1 2 3 3b 4 5; do
#         python train.py config/tiny/model.py config/tiny/stage$s.py
#     done
data_dir = 'data/demo'
prepare = 'prepare/demo.py'

vocab_size = 4096
n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 128
ffn_dim = 352
rope_theta = 10000.0

block_size = 256
batch_size = 16
total_batch_tokens = 16 * 256
warmup_steps = 10
min_lr_frac = 0.1
log_interval = 5
eval_interval = 50
eval_rows = 32
save_interval = 100
