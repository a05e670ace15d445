# The data speedrun on one GPU: 29M parameters, 1,200 steps of 32,768 tokens, 7.6e15 FLOPs.
vocab_size = 2048
n_layer = 9
n_head = 8
n_kv_head = 4
n_embd = 512
ffn_dim = 1408
tie_embeddings = False
rope_theta = 10000.0

block_size = 512
batch_size = 64
total_batch_tokens = 64 * 512
max_steps = 1200
optimizer = 'muon'
learning_rate = 1e-2
schedule = 'cosine'
weight_decay = 0.01
