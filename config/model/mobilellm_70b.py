# MobileLLM-type 70B: untied, Llama-3 vocabulary.
vocab_size = 128256
n_layer = 80
n_head = 64
n_kv_head = 8
n_embd = 8192
ffn_dim = 28672
tie_embeddings = False
qk_norm = True
qk_norm_weight = False
