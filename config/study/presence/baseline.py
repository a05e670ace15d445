# Micro-batches have equal weights.
batch_size = 4                   # 8 micro-batches in a step
presence = 'off'
