# from more to less along a cosine
batch_size = 4                   # 8 micro-batches of a step
presence = 'store'
presence_schedule = 'cosine'
