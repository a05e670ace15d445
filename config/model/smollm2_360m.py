# SmolLM2-360M: 361,821,120 parameters, tied.
vocab_size = 49152
n_layer = 32
n_head = 15
n_kv_head = 5
n_embd = 960
ffn_dim = 2560
rope_theta = 100000.0
