# MobileLLM-type 671B (674.8B parameters by count, 41.4B active per token): 3 dense layers, then
# layers of 256 routed experts, 8 active per token, and a shared one.
# It needs 256 or more GPUs of 80 GB: --tp=8 --ep=16 --activation_checkpointing=full
# (python tools/plan.py).
vocab_size = 128256
n_layer = 61
n_head = 128
n_kv_head = 8
n_embd = 7168
head_dim = 128
ffn_dim = 18432
tie_embeddings = False
qk_norm = True
qk_norm_weight = False
n_expert = 256
n_expert_active = 8
n_shared_expert = 1
expert_ffn_dim = 2048
n_dense_layer = 3
