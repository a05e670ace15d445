# Stage 3, mid-training phase 1 of MobileLLM-R1: 100B tokens, distilled from Llama-3.1-8B-Instruct,
# 50k steps of 128 GPUs x 4 rows x 4096 tokens. Published: 1 to 2 days, KD loss < 2.0, agreement
# with the teacher > 60 %, accuracy > 45 %. Not measured here.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py \
#     config/model/mobilellm_140m.py config/stage3.py
# The teacher runs beside the student. To run it once for several students, cache it with
# `kd.py cache` and add --kd_cache=<name>.
out_dir = 'out/stage3'
init_from = 'out/stage2'
teacher = 'meta-llama/Llama-3.1-8B-Instruct'
kd_alpha = 1.0
kd_temperature = 1.0
sources = {                     # share of tokens
    'dolmino_dclm': 0.3703,
    'dolmino_flan': 0.0410,
    'dolmino_pes2o': 0.1141,
    'dolmino_wiki': 0.0266,
    'dolmino_stackexchange': 0.0212,
    'dolmino_math': 0.1163,
    'nemotron_pretraining_code': 0.2069,
    'nemotron_cc_math': 0.0345,
    'starcoder': 0.0690,
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
