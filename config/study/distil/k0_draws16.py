# Distilled from a cache with 16 draws per token.
sources = {'math': 1.0, 'web_edu': 1.0}
kd_cache = 'k0_draws16'
