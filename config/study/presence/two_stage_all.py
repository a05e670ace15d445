# Like two_stage, with self-influence from all layers.
batch_size = 4                   # 8 micro-batches in a step
presence = 'store'
presence_schedule = 'two_stage'
presence_layers = 'all'
