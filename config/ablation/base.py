# The size of the ablations: SmolLM2-135M on the sources of stage 2, 5000 steps of 32 rows. It comes
# before the file of an arm. No arm has been run at this size, so there is no loss to expect.
# python train.py config/model/smollm2_135m.py config/ablation/base.py config/ablation/<arm>.py
sources = {
    'dclm': 0.25,
    'fineweb_edu': 0.30,
    'github_code': 0.15,
    'finemath': 0.15,
    'slimpajama': 0.15,
}
block_size = 2048
batch_size = 8
total_batch_tokens = 32 * 2048
max_steps = 5000
learning_rate = 4e-3
warmup_steps = 250
eval_interval = 250
save_interval = 1000
