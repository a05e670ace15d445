#!/usr/bin/env bash
# Two nodes of eight GPUs without a scheduler. Run this on both nodes, with RANK_OF_NODE 0 and 1 and
# the name of the first node in HOST:
#   RANK_OF_NODE=0 HOST=node0 bash config/launch/two_nodes.sh \
#       config/model/mobilellm_950m.py config/stage1.py --dp_replicate=2
# When a rank ends, all ranks end. torchrun starts them again up to 20 times, and the run continues
# from its last checkpoint.
set -euo pipefail
export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1        # every attempt gets a new store
exec torchrun --nnodes=2 --node_rank="${RANK_OF_NODE:?}" --nproc_per_node="${GPUS_PER_NODE:-8}" --max-restarts="${RESTARTS:-20}" \
    --rdzv_backend=c10d --rdzv_endpoint="${HOST:?}:29500" --rdzv_id=train train.py "$@"
