# Distilled from the running teacher alone.
sources = {'math': 1.0, 'web_edu': 1.0}
teacher = 'out/study_teacher'
