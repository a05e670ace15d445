# what is new to the model counts less, all along
batch_size = 4                   # 8 micro-batches of a step
presence = 'store'
presence_tau = -1.0
