# General SFT at a small scale, on conversations from a generator.
# python train.py config/tiny/model.py config/tiny/stage4.py
out_dir = 'out/tiny/stage4'
init_from = 'out/tiny/stage3b'
sources = {'chat': 1.0}
packing = 'document'
epochs = 2.0
learning_rate = 1e-3
warmup_frac = 0.03
min_lr_frac = 0.0
weight_decay = 0.0
