#!/usr/bin/env bash
# One of NODES (1:4) hosts, all of which run this; ENDPOINT names one of them and a port. From the project's folder:
#   ENDPOINT=host0:29400 RANKS=8 launch/torchrun/elastic.sh recipe.yaml [--flag value ...]
# torchrun unpickles what comes to that port: only on a network that you trust.
set -euo pipefail

exec torchrun --nnodes "${NODES:-1:4}" --nproc-per-node "${RANKS:-gpu}" --max-restarts "${RESTARTS:-20}" \
    --rdzv-backend c10d --rdzv-id "${NAME:-bigvision}" --rdzv-endpoint "${ENDPOINT:?ENDPOINT=HOST:PORT}" launch/train.py "$@"
