# Plain training.
sources = {'math': 1.0, 'web_edu': 1.0}
