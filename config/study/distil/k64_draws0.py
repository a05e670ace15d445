# Distilled from a cache with the 64 most likely ids per token and no draws.
sources = {'math': 1.0, 'web_edu': 1.0}
kd_cache = 'k64_draws0'
