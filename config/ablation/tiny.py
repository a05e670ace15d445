# Any of these ablations at the demo's size: the demo's data, a model of 3.1M parameters. It takes 4
# to 5 minutes on two CPU cores, without a network. It comes after the file of an arm, and base.py
# can be left out.
# python train.py config/ablation/influence_dynamic.py config/ablation/tiny.py
out_dir = out_dir + '_tiny'
data_dir = 'data/demo'
prepare = 'prepare/demo.py'
sources = {'code': 1.0, 'docs': 1.0, 'math': 1.0, 'noise': 1.0}
# The demo makes probe sets for these sources.
probe = {'code': 1.0, 'docs': 1.0, 'math': 1.0} if probe else {}
probe_rows = 32
influence_rows = 16

vocab_size = 4096
n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 192
ffn_dim = 512
rope_theta = 10000.0

block_size = 128
batch_size = 4 if presence != 'off' else 16
total_batch_tokens = 32 * 128
max_steps = 200
mixture_interval = 20
learning_rate = 1.5e-3
warmup_steps = 20
log_interval = 10
eval_interval = 100
eval_rows = 64
save_interval = 100
