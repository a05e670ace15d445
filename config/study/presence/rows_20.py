# Control of inverse: equal weights and 20 rows of 64 tokens in a step in place of 32, about as many
# as the weights of inverse amount to.
batch_size = 4                   # 5 micro-batches in a step
total_batch_tokens = 20 * 64
presence = 'off'
