# Control of inverse: its weights, given to the micro-batches of a step in random order.
batch_size = 4                   # 8 micro-batches in a step
presence = 'store'
presence_tau = -1.0
presence_permute = True
