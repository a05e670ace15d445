# Half distilled from the running teacher, half cross-entropy.
sources = {'math': 1.0, 'web_edu': 1.0}
teacher = 'out/study_teacher'
kd_alpha = 0.5
