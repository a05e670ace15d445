# Mixing laws and baseline mixtures at a small scale: three of the demo's sources, a model of 0.6M
# parameters, 300 steps of 1,024 tokens. A run takes half a minute of one CPU core.
# Muon and an untied output table keep the noise of the seed small after so few steps.
# python tools/sweep.py mixture --dirichlet --n=9 --seeds="[0, 1, 2]" --jobs=2 \
#     --out=out/static config/ablation/mixing.py
# For your own text: --prepare=None --data_dir=... --sources="{...}" --vocab_size=...
data_dir = 'data/demo'
prepare = 'prepare/demo.py'
sources = {'code': 1.0, 'docs': 1.0, 'math': 1.0}

vocab_size = 4096
n_layer = 2
n_head = 2
n_kv_head = 1
n_embd = 64
ffn_dim = 160
tie_embeddings = False
rope_theta = 10000.0

block_size = 64
batch_size = 16
total_batch_tokens = 16 * 64
max_steps = 300
optimizer = 'muon'
learning_rate = 1e-2
warmup_steps = 20
schedule = 'cosine'
weight_decay = 0.01

mixture_interval = 100               # a round of aioli explores for 4 * 2 * 3 of these steps
mixture_warmup = 0
max_epochs = None
mixture_rows = 96

log_interval = 1
eval_interval = 300
eval_rows = 256
save_interval = 1000
dtype = 'float32'
compile = False
