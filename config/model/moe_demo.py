# The demo's model with experts: 6.6M parameters, 3.8M active per token. The first layer is dense.
# The others have 8 routed experts of width 192, two active per token, and a shared one.
# python train.py config/demo.py config/model/moe_demo.py --out_dir=out/moe_demo
# On two ranks, add --ep=2.
vocab_size = 4096
n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 192
ffn_dim = 512
rope_theta = 10000.0
n_expert = 8
n_expert_active = 2
n_shared_expert = 1
expert_ffn_dim = 192
n_dense_layer = 1
