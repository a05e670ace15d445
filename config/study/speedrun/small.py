# The data speedrun on CPU cores: 1.2M parameters, 400 steps of 4,096 tokens, 1.1e13 FLOPs.
vocab_size = 2048
n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 128
ffn_dim = 320
tie_embeddings = False
rope_theta = 10000.0

block_size = 128
batch_size = 32
total_batch_tokens = 32 * 128
max_steps = 400
optimizer = 'muon'
learning_rate = 1e-2
schedule = 'cosine'
weight_decay = 0.01
dtype = 'float32'
compile = False
