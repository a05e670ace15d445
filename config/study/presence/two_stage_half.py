# more at first, less after half of the run
batch_size = 4                   # 8 micro-batches of a step
presence = 'store'
presence_schedule = 'two_stage'
presence_switch = 200
