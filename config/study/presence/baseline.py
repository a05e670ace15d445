# plain accumulation
batch_size = 4                   # 8 micro-batches of a step
presence = 'off'
