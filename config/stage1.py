# Stage 1, pre-training phase 1 of MobileLLM-R1: 2T tokens, 500k steps of 128 GPUs x 16 rows x 2048
# tokens. Published: 4 to 5 days, final loss 2.8 (140M), 2.6 (360M), 2.4 (950M). Not measured here.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py \
#     config/model/mobilellm_140m.py config/stage1.py
out_dir = 'out/stage1'
sources = {                     # share of tokens
    'starcoder': 0.1066,
    'openwebmath': 0.0693,
    'fineweb_edu': 0.6375,
    'wikipedia': 0.0503,
    'arxiv': 0.0636,
    'stackexchange': 0.0503,
    'algebraic_stack': 0.0225,
}
block_size = 2048
batch_size = 16
total_batch_tokens = 128 * 16 * 2048
max_tokens = 500_000 * total_batch_tokens
learning_rate = 4e-3
warmup_steps = 2000
schedule = 'linear'
min_lr_frac = 0.1
weight_decay = 0.1
eval_interval = 2000
save_interval = 2000
