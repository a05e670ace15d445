# MobileLLM-R1 950M: 950M parameters (753M without embeddings), tied, Llama-3 vocabulary.
vocab_size = 128256
n_layer = 22
n_head = 24
n_kv_head = 6
n_embd = 1536
ffn_dim = 6144
qk_norm = True
qk_norm_weight = False
