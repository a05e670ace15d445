# Micro-batches that are new to the model count more, for the whole run.
batch_size = 4                   # 8 micro-batches in a step
presence = 'store'
presence_tau = 1.0
