# The teacher of the distillation study, after config/study/base.py: 1.8M parameters, 3.3M tokens of
# the four sources of real text.
out_dir = 'out/study_teacher'
sources = {'code': 1.0, 'math': 1.0, 'web_edu': 1.0, 'wiki': 1.0}
n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 160
ffn_dim = 448
batch_size = 64
total_batch_tokens = 64 * 64
max_steps = 800
