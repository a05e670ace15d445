# Influence, arm A: the start weights are kept. It comes after config/ablation/base.py.
out_dir = 'out/influence_fixed'
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}      # only its loss is logged
