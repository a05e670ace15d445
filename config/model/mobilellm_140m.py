# MobileLLM-R1 140M: 140,248,512 parameters (66.4M without embeddings), tied, Llama-3 vocabulary.
vocab_size = 128256
n_layer = 15
n_head = 9
n_kv_head = 3
n_embd = 576
ffn_dim = 2048
qk_norm = True
qk_norm_weight = False
