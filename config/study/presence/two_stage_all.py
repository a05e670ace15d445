# as two_stage, scored by all layers
batch_size = 4                   # 8 micro-batches of a step
presence = 'store'
presence_schedule = 'two_stage'
presence_layers = 'all'
