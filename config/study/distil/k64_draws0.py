# from a cache: the 64 likeliest ids of a token, no draws
sources = {'math': 1.0, 'web_edu': 1.0}
kd_cache = 'k64_draws0'
