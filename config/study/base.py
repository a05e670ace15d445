# The studies on real text: 0.35M parameters, 400 steps of 2,048 tokens, a minute of one CPU core.
# prepare/folder.py makes the data: five sources, one of them noise. Muon and an untied output table
# keep the noise of the seed small after so few steps.
data_dir = 'data/study'
sources = {'code': 1.0, 'math': 1.0, 'web_edu': 1.0, 'wiki': 1.0, 'noise': 1.0}

vocab_size = 2048
n_layer = 2
n_head = 2
n_kv_head = 1
n_embd = 64
ffn_dim = 160
tie_embeddings = False
rope_theta = 10000.0

block_size = 64
batch_size = 32
total_batch_tokens = 32 * 64
max_steps = 400
optimizer = 'muon'
learning_rate = 1e-2
warmup_steps = 20
schedule = 'cosine'
weight_decay = 0.01

log_interval = 5
eval_interval = 100
eval_rows = 256
save_interval = 1000
dtype = 'float32'
compile = False
