# As joint, and the weights are pulled towards those of the start, so that they converge.
mixture = 'influence'
mixture_interval = 25
mixture_warmup = 50
probe_rows = 64
influence_rows = 16
influence_kl = 0.5
probe = {'code': 1.0, 'math': 1.0, 'web': 1.0}
