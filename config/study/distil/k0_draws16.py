# from a cache: 16 draws of a token
sources = {'math': 1.0, 'web_edu': 1.0}
kd_cache = 'k0_draws16'
