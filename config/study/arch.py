# Architectures on the four sources of real text, after config/study/base.py. Runs are short because
# some models have 9M parameters.
sources = {'code': 1.0, 'math': 1.0, 'web_edu': 1.0, 'wiki': 1.0}
max_steps = 120
eval_interval = 60
