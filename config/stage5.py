# Stage 5, long-reasoning SFT of MobileLLM-R1: 6.2M conversations, 4 epochs, 128 GPUs x 8 rows x 32,768 tokens; 2.5 days there. (Another
# account of the recipe has 3 epochs at 1e-5.) The base of the rotary positions is that of the model's config times 8, so the model's file
# comes first. --dry_run=True says what it takes; no expected loss: not run here at this size.
# torchrun --nnodes=16 --nproc_per_node=8 ... train.py config/model/mobilellm_140m.py config/stage5.py
out_dir = 'out/stage5'
init_from = 'out/stage4'
sources = {'openmathreasoning': 1.0, 'opensciencereasoning': 1.0, 'opencodereasoning': 1.0}     # 3.2M, 803K, 2.16M conversations
weigh_by = 'size'               # every one of them is read `epochs` times
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
