#!/usr/bin/env bash
# SLURM, one task for each GPU:
#   sbatch --nodes=4 config/launch/slurm.sh config/model/mobilellm_7b.py config/stage1.py --tp=4
# The job gets SIGTERM two minutes before its time is up, or when it is preempted. The run then
# saves after the current step, ends with exit code 143, and is queued again. After a fault (exit
# code 1) it is also queued again, up to 20 times. A mistake in the config (exit code 2) ends it.
#SBATCH --job-name=train
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail
export OMP_NUM_THREADS=1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python train.py "$@"' train "$@"
code=$?
if [ $code -ne 0 ] && [ $code -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    echo "train.py ended with $code: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
