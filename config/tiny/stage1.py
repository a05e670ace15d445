# Pre-training phase 1 at a small scale.
# python train.py config/tiny/model.py config/tiny/stage1.py
out_dir = 'out/tiny/stage1'
sources = {'code': 0.35, 'docs': 0.3, 'math': 0.25, 'noise': 0.1}
max_steps = 80
learning_rate = 3e-3
