# Mid-training phase 1 at a small scale: distilled from a teacher that runs beside the student.
# python train.py config/tiny/model.py config/tiny/stage3.py
out_dir = 'out/tiny/stage3'
init_from = 'out/tiny/stage2'
teacher = 'out/tiny/teacher'
sources = {'code': 0.3, 'docs': 0.3, 'math': 0.4}
max_steps = 80
learning_rate = 1e-3
warmup_steps = 0
min_lr_frac = 0.0
