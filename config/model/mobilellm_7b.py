# MobileLLM-type 7B: untied, Llama-3 vocabulary.
vocab_size = 128256
n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
ffn_dim = 11008
tie_embeddings = False
qk_norm = True
qk_norm_weight = False
