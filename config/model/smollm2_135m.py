# SmolLM2-135M: 134,515,008 parameters, tied.
vocab_size = 49152
n_layer = 30
n_head = 9
n_kv_head = 3
n_embd = 576
ffn_dim = 1536
rope_theta = 100000.0
