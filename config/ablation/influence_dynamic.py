# Influence, arm B: every 250 steps the weights follow the influence of every source on the probe
# sets, which prepare/probe.py makes. It comes after config/ablation/base.py.
out_dir = 'out/influence_dynamic'
mixture = 'influence'
mixture_interval = 250
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}
probe_rows = 67                                     # about 200 in all
