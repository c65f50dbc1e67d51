#!/usr/bin/env bash
# Runs a command as several processes, on this machine or on several, under PyTorch's elastic launcher (tools/launch.py).
# With several nodes, run it on each node, with the same MASTER_ADDR and MASTER_PORT (node 0's) and its own NODE_RANK.
# MAX_RESTARTS=3 starts all processes again after a failure, up to three times; with --resume auto, main.py resumes.
# On SIGTERM, SIGUSR1, SIGUSR2 and SIGINT main.py saves and exits; after PREEMPT_SECONDS (120) what still runs is killed.
# A node waits JOIN_SECONDS (1800) for the others.
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/dev/env.sh"

usage="usage: [GPUS_PER_NODE=8] [MAX_RESTARTS=0] [PREEMPT_SECONDS=120] [JOIN_SECONDS=1800] [MASTER_ADDR=<node 0> MASTER_PORT=29500 NODE_RANK=<0, 1, ...>] $0 <processes> <command> [arguments]"
if [[ ${1-} == -h || ${1-} == --help ]]; then
  printf '%s\n' "$usage" "example: $0 2 main.py --coco_path data/mine --output_dir exps/mine --resume auto"
  exit 0
fi
(($# >= 2)) || die "$usage"
split_over_nodes "$1"
shift
[[ $1 != *.py ]] || set -- python -u "$@"
command -v -- "$1" >/dev/null || die "'$1' is not an executable command"
require_torch

# With GPUs, the data loaders need the cores. Without, the processes share them.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  OMP_NUM_THREADS=1
  if [[ ${CUDA_VISIBLE_DEVICES-all} == "" || $(nvidia-smi -L 2>/dev/null) != GPU* ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    OMP_NUM_THREADS=$((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))
  fi
fi
export OMP_NUM_THREADS

for name in MASTER_PORT MAX_RESTARTS PREEMPT_SECONDS JOIN_SECONDS; do
  [[ -n ${!name:-} ]] || unset "$name"
  [[ ${!name:-1} =~ ^[0-9]{1,5}$ ]] || die "$name must be a whole number below 100000, not '${!name}'"
done

# With defaults, every node would wait for itself until the rendezvous times out.
((NODES == 1)) || [[ -n ${MASTER_ADDR:-} && -n ${NODE_RANK:-} ]] ||
  die "$NODES nodes of $GPUS_PER_NODE processes: set MASTER_ADDR to node 0's address and NODE_RANK to the node's number"
export NODE_RANK=${NODE_RANK:-0}
if [[ ! $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= NODES)); then
  die "NODE_RANK must be from 0 to $((NODES - 1)) for $NODES node(s) of $GPUS_PER_NODE processes, not '$NODE_RANK'"
fi

# A single node takes a free port, so that several jobs can share the machine.
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
if ((NODES > 1)); then
  export MASTER_PORT=${MASTER_PORT:-29500}
  echo "${0##*/}: node $NODE_RANK of $NODES meets the others at $MASTER_ADDR:$MASTER_PORT" >&2
fi

exec python -m tools.launch "$NODES" "$NODE_RANK" "$GPUS_PER_NODE" "$@"
