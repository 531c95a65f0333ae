#!/usr/bin/env bash
# Ranks of one host, which meet in a private file instead of a port that is open to the network. From the project's folder:
#   RANKS=8 launch/torchrun/one_host.sh recipe.yaml [--flag value ...]
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
# The ranks share the cores; torchrun alone would give each rank one thread.
ranks="${RANKS:-2}"
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((cores + ranks - 1) / ranks))}"

torchrun --nproc-per-node "$ranks" --rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint "$folder/rendezvous" \
    --local-addr 127.0.0.1 launch/train.py "$@"
