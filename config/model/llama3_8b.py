# Llama-3.1-8B, the teacher of mid-training: 8,030,261,248 parameters, untied. RoPE scaling
# extends its context to 128k.
vocab_size = 128256
n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
ffn_dim = 14336
tie_embeddings = False
rope_scaling = dict(
    type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position=8192)
