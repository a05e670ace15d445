# Stage 5, long-reasoning SFT of MobileLLM-R1: 6.2M conversations, 4 epochs, 128 GPUs x 8 rows x
# 32,768 tokens. Published: 2.5 days. (Another account of the recipe has 3 epochs at 1e-5.) RoPE
# theta is 8 times that of the model's config, so the model's file comes first. --dry_run=True
# prints the cost. Not run here at this size, so there is no loss to expect.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py \
#     config/model/mobilellm_140m.py config/stage5.py
out_dir = 'out/stage5'
init_from = 'out/stage4'
sources = {
    'openmathreasoning': 1.0,           # 3.2M conversations
    'opensciencereasoning': 1.0,        # 803K
    'opencodereasoning': 1.0,           # 2.16M
}
weigh_by = 'size'               # each source is read `epochs` times
rope_theta = 8 * rope_theta
packing = 'document'
overlong = 'truncate'
activation_checkpointing = 'full'
block_size = 32768
batch_size = 8
total_batch_tokens = 128 * 8 * 32768
epochs = 4.0
learning_rate = 8e-5
warmup_frac = 0.1
schedule = 'linear'
min_lr_frac = 0.0
weight_decay = 0.0
eval_interval = 200
save_interval = 200
