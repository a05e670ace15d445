# New micro-batches count more in the first half of the run, then less.
batch_size = 4                   # 8 micro-batches in a step
presence = 'store'
presence_schedule = 'two_stage'
presence_switch = 200
