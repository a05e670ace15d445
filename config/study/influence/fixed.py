# Equal weights for the whole run: a fifth of the rows is noise.
mixture = 'fixed'
sources = {'code': 1.0, 'math': 1.0, 'web_edu': 1.0, 'wiki': 1.0, 'noise': 1.0}
