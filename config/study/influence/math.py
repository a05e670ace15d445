# Influence on the math probe set alone, every 25 steps.
mixture = 'influence'
mixture_interval = 25
mixture_warmup = 50
probe_rows = 64
influence_rows = 16
probe = {'math': 1.0}
