# The ablations of influence from real weights, at a size for two CPU cores: SmolLM2-135M is trained
# on for 100 steps of 4,096 tokens on five sources of real text, one of them noise. It comes after
# the file of an arm. docs/RESULTS.md says how weights and data were made, and has the losses.
# An arm takes 40 minutes to an hour of one core.
# python train.py config/model/smollm2_135m.py config/ablation/influence_dynamic.py \
#     config/ablation/real.py --init_from=smollm2
out_dir = out_dir + '_real'
data_dir = 'data/real'
sources = {'web_edu': 1.0, 'wiki': 1.0, 'code': 1.0, 'math': 1.0, 'noise': 1.0}
probe_rows = 48
influence_rows = 24

block_size = 256
batch_size = 4
total_batch_tokens = 16 * 256
max_steps = 100
mixture_interval = 20
learning_rate = 3e-4
warmup_steps = 10
log_interval = 5
eval_interval = 50
eval_rows = 48
save_interval = 50
