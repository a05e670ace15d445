# New micro-batches count more at first and less at the end, along a cosine.
batch_size = 4                   # 8 micro-batches in a step
presence = 'store'
presence_schedule = 'cosine'
