# Long-reasoning SFT at a small scale: rows are four times as long.
# python train.py config/tiny/model.py config/tiny/stage5.py
out_dir = 'out/tiny/stage5'
init_from = 'out/tiny/stage4'
sources = {'reasoning': 1.0}
rope_theta = 8 * rope_theta
packing = 'document'
activation_checkpointing = 'full'
block_size = 1024
batch_size = 4
epochs = 1.0
learning_rate = 1e-3
warmup_frac = 0.1
min_lr_frac = 0.0
weight_decay = 0.0
sample_tokens = 120
sample_prompt = ''
