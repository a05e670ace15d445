# MobileLLM-R1 360M: 359M parameters (228M without embeddings), tied, Llama-3 vocabulary.
vocab_size = 128256
n_layer = 15
n_head = 16
n_kv_head = 4
n_embd = 1024
ffn_dim = 4096
qk_norm = True
qk_norm_weight = False
