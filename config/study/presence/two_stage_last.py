# as two_stage, scored by the last block
batch_size = 4                   # 8 micro-batches of a step
presence = 'store'
presence_schedule = 'two_stage'
presence_layers = 'last'
