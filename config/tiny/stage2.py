# Pre-training phase 2 at a small scale: influence re-weights the mixture.
# python train.py config/tiny/model.py config/tiny/stage2.py
out_dir = 'out/tiny/stage2'
init_from = 'out/tiny/stage1'
sources = {'code': 0.35, 'docs': 0.3, 'math': 0.25, 'noise': 0.1}
mixture = 'influence'
mixture_interval = 10
probe = {'code': 1.0, 'docs': 1.0, 'math': 1.0}
probe_rows = 24
influence_rows = 16
max_steps = 80
learning_rate = 2e-3
