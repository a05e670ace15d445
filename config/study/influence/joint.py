# Influence on the probe sets of three domains, every 25 steps.
mixture = 'influence'
mixture_interval = 25
mixture_warmup = 50
probe_rows = 64
influence_rows = 16
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}
