#!/usr/bin/env bash
#SBATCH --job-name=dtm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# From the checkout:
#     sbatch docs/examples/slurm.sh --recipe dtm_vit_base_patch16_in1k \
#         --data.train-folder /data/train --data.test-folder /data/val
# Five minutes before its time is up, and when it is preempted, the job saves a checkpoint, ends, and is queued again.
set -uo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD HOSTS="$SLURM_NNODES" RUN="$SLURM_JOB_ID" PORT=$((20000 + SLURM_JOB_ID % 10000))
asked=
trap 'asked=1; kill -TERM "$step"' TERM
srun --kill-on-bad-exit=0 docs/examples/torchrun.sh "$@" &
step=$!
wait "$step"
code=$?
if [ -n "$asked" ]; then
  wait "$step" # the first one ended with the signal, not with the step
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
