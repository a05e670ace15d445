# from a cache: the 64 likeliest ids of a token, 16 draws from the rest
sources = {'math': 1.0, 'web_edu': 1.0}
kd_cache = 'k64_draws16'
