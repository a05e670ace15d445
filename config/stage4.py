# Stage 4, general SFT of MobileLLM-R1 on Tulu 3: 866K conversations, 2 epochs, 128 GPUs x 4 rows x
# 4096 tokens. Published: 2 hours. Full conversations are packed into rows, and only the assistant's
# tokens are supervised. Not run here at this size, so there is no loss to expect.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py \
#     config/model/mobilellm_140m.py config/stage4.py
out_dir = 'out/stage4'
init_from = 'out/stage3b'
sources = {'tulu3': 1.0}
packing = 'document'
overlong = 'truncate'
block_size = 4096
batch_size = 4
total_batch_tokens = 128 * 4 * 4096
epochs = 2.0
learning_rate = 5e-6
warmup_frac = 0.03
schedule = 'linear'
min_lr_frac = 0.0
weight_decay = 0.0
eval_interval = 100
save_interval = 100
