# Control of direct: equal weights and 14 rows of 64 tokens in a step in place of 32, about as many
# as the weights of direct amount to.
batch_size = 2                   # 7 micro-batches in a step
total_batch_tokens = 14 * 64
presence = 'off'
