#!/usr/bin/env bash
# Runs a command as several processes, on this machine or on several, and ends all of them when one fails.
# With several nodes, run it on each: the same MASTER_ADDR and MASTER_PORT (node 0's), its own NODE_RANK.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

(($# >= 2)) || die "usage: [GPUS_PER_NODE=8] [MASTER_ADDR=<node 0> MASTER_PORT=29500 NODE_RANK=<0, 1, ...>] $0 <processes> <command> [arguments]"
split_over_nodes "$1"
shift
[[ $1 != *.py ]] || set -- python -u "$@"
command -v -- "$1" >/dev/null || die "'$1' is not an executable command"
require_torch

# On GPUs the cores are the data loaders'; without, the processes share them.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  OMP_NUM_THREADS=1
  if [[ ${CUDA_VISIBLE_DEVICES-all} == "" || $(nvidia-smi -L 2>/dev/null) != GPU* ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    OMP_NUM_THREADS=$((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))
  fi
fi
export OMP_NUM_THREADS

# With defaults for these, every node would wait for itself until the rendezvous times out.
((NODES == 1)) || [[ -n ${MASTER_ADDR:-} && -n ${NODE_RANK:-} ]] ||
  die "$NODES nodes of $GPUS_PER_NODE processes: set MASTER_ADDR to node 0's address and NODE_RANK to the node's number"
export NODE_RANK=${NODE_RANK:-0}
if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= NODES)); then
  die "NODE_RANK must be from 0 to $((NODES - 1)) for $NODES node(s) of $GPUS_PER_NODE processes, not '$NODE_RANK'"
fi

torchrun=(--no_python --nnodes="$NODES" --nproc_per_node="$GPUS_PER_NODE")
if ((NODES == 1)) && [[ -z ${MASTER_PORT:-} ]]; then
  # torchrun finds a free port, so that several jobs can share the machine
  torchrun+=(--standalone --local_addr="${MASTER_ADDR:-127.0.0.1}")
else
  export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
  torchrun+=(--node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
  ((NODES == 1)) || echo "${0##*/}: node $NODE_RANK of $NODES meets the others at $MASTER_ADDR:$MASTER_PORT" >&2
fi

exec python tools/run_node.py "$NODES" "$NODE_RANK" "${torchrun[@]}" "$@"
