# Stage 2, pre-training phase 2 of MobileLLM-R1: continues stage 1 for 2T tokens, and influence
# re-weights the mixture. prepare/probe.py makes the probe sets. With --mixture=fixed it keeps these
# shares. Not measured here.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py \
#     config/model/mobilellm_140m.py config/stage2.py
out_dir = 'out/stage2'
init_from = 'out/stage1'
sources = {                     # share of tokens
    'starcoder': 0.0052,
    'openwebmath': 0.2333,
    'fineweb_edu': 0.5483,
    'wikipedia': 0.0014,
    'arxiv': 0.0132,
    'stackexchange': 0.0086,
    'algebraic_stack': 0.0126,
    'nemotron_science': 0.0003,
    'nemotron_code': 0.0072,
    'nemotron_math': 0.0301,
    'cosmopedia': 0.0270,
    'natural_reasoning': 0.0318,
    'finemath': 0.0801,
    'pes2o': 0.0008,
}
mixture = 'influence'
mixture_interval = 2000
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}
probe_rows = 512                # at least 256 for 128 ranks
influence_rows = 512
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
