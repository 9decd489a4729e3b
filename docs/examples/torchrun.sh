#!/usr/bin/env bash
# On every host, within a few minutes:
#     HEAD=host1 HOSTS=2 docs/examples/torchrun.sh --recipe dtm_vit_base_patch16_in1k \
#         --data.train-folder /data/train --data.test-folder /data/val
# HEAD: name or address of the first host. HOSTS: their number, or least:most for a run that may lose and gain hosts.
# PROCESSES: a host's, by default one for each GPU. RESTARTS: how often failed processes are started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or torchrun lets no host join a run that goes on
exec torchrun \
  --nnodes="${HOSTS:-1}" \
  --nproc-per-node="${PROCESSES:-gpu}" \
  --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d \
  --rdzv-id="${RUN:-dtm}" \
  --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29400}" \
  train/pretrain.py "$@"
