# Stage 3, mid-training phase 2 of MobileLLM-R1: like stage3.py, starting from its result, with more
# mathematics and code, for another 100B tokens.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py \
#     config/model/mobilellm_140m.py config/stage3b.py
out_dir = 'out/stage3b'
init_from = 'out/stage3'
teacher = 'meta-llama/Llama-3.1-8B-Instruct'
kd_alpha = 1.0
kd_temperature = 1.0
sources = {                     # share of tokens
    'dolmino_dclm': 0.0651,
    'dolmino_flan': 0.0072,
    'dolmino_pes2o': 0.0201,
    'dolmino_wiki': 0.0047,
    'dolmino_stackexchange': 0.0200,
    'dolmino_math': 0.2910,
    'nemotron_pretraining_code': 0.2910,
    'nemotron_cc_math': 0.1940,
    'starcoder': 0.0970,
    'benchmark_train': 0.0097,
}
block_size = 4096
batch_size = 4
total_batch_tokens = 128 * 4 * 4096
max_tokens = 50_000 * total_batch_tokens
learning_rate = 3.6e-4
warmup_steps = 0
schedule = 'linear'
min_lr_frac = 0.0
weight_decay = 0.1
eval_interval = 1000
save_interval = 1000
