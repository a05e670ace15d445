# Mid-training phase 2 at a small scale: distilled from a cache of the teacher.
# python kd.py cache --teacher=out/tiny/teacher --source=math --data_dir=data/demo \
#     --block_size=256 --batch_size=16
# python train.py config/tiny/model.py config/tiny/stage3b.py
out_dir = 'out/tiny/stage3b'
init_from = 'out/tiny/stage3'
teacher = 'out/tiny/teacher'
kd_cache = 'teacher'
sources = {'math': 1.0}
max_steps = 50
learning_rate = 1e-3
warmup_steps = 0
min_lr_frac = 0.0
