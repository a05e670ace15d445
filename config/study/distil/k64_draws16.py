# Distilled from a cache with the 64 most likely ids per token and 16 draws from the rest.
sources = {'math': 1.0, 'web_edu': 1.0}
kd_cache = 'k64_draws16'
