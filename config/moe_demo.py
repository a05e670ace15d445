# The demo with experts: 8.6M parameters, of which a token passes through 3.4M (8 routed experts of 192, two per token, and a shared one; the first layer
# is dense). python train.py config/demo.py config/moe_demo.py, or torchrun --standalone --nproc_per_node=2 train.py config/demo.py config/moe_demo.py --ep=2
out_dir = 'out/moe_demo'
n_expert = 8
n_expert_active = 2
n_shared_expert = 1
expert_ffn_dim = 192
n_dense_layer = 1
balance_rate = 1e-3
