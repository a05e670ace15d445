# No noise from the first step: the mixture that the other arms have to find.
mixture = 'fixed'
sources = {'code': 1.0, 'math': 1.0, 'web_edu': 1.0, 'wiki': 1.0, 'noise': 0.0}
