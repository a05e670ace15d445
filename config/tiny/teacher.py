# The teacher of stage 3 at a small scale: 2.5M parameters.
# python train.py config/tiny/model.py config/tiny/teacher.py
out_dir = 'out/tiny/teacher'
sources = {'code': 0.3, 'docs': 0.3, 'math': 0.4}
n_layer = 6
n_embd = 160
ffn_dim = 448
max_steps = 250
learning_rate = 3e-3
