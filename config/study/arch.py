# Architectures on the four sources of real text, after config/study/base.py: short runs, since models of 9M parameters take part.
sources = {'code': 1.0, 'math': 1.0, 'web_edu': 1.0, 'wiki': 1.0}
max_steps = 120
eval_interval = 60
