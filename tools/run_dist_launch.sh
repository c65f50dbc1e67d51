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

# torchrun, with two additions. It ends the processes of its own node only, and the other nodes would wait until a
# collective times out: so a node that fails says so in the rendezvous store, which node 0 serves, and the others look
# there. And the first failure is told in one line with its own exit status, not as a traceback of the launcher.
run_node='
import contextlib, os, queue, signal, sys, threading, time
from datetime import timedelta
from torch.distributed import DistNetworkError, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

def say(message):
    print("run_dist_launch.sh:", message, file=sys.stderr, flush=True)

def run(arguments):
    try:
        main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            say(f"rank {rank} failed with exit status {failure.exitcode}, see its message above; all others were ended")
            return failure.exitcode
        memory = " (is the memory exhausted?)" if failure.exitcode == -signal.SIGKILL else ""
        say(f"rank {rank} was killed by {failure.signal_name()}{memory}; all others were ended")
        return 128 - failure.exitcode
    except SignalException as error:
        say(f"ended by {error.sigval.name}")
        return 128 + error.sigval
    except DistNetworkError as error:
        say(str(error).splitlines()[0])
        return 1
    return 0

def end_with_other_nodes(node, status):
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        options = {"is_master": node == "0", "multi_tenant": True, "wait_for_workers": False}
        store = TCPStore(*address, timeout=timedelta(days=1), **options)  # torchrun gives up on node 0 long before
        while not store.check(["failed_node"]):
            with contextlib.suppress(queue.Empty):
                if status.get(timeout=1) == 0:
                    return
                store.set("failed_node", node)
        failed = store.get("failed_node").decode()
    except RuntimeError:
        with contextlib.suppress(queue.Empty):
            status.get(timeout=10)  # node 0 may be the first to leave when all is done
            return
        failed = "0"
    if failed != node and status.empty():
        say(f"node {failed} failed, see its output; ending node {node}")
        os.kill(os.getpid(), signal.SIGTERM)
    if node == "0":
        time.sleep(2)  # until all have seen it

nodes, node, *arguments = sys.argv[1:]
if nodes == "1":
    sys.exit(run(arguments))
status = queue.SimpleQueue()
watch = threading.Thread(target=end_with_other_nodes, args=[node, status], daemon=True)
watch.start()
code = run(arguments)
status.put(code)
watch.join(5)
sys.exit(code)
'
exec python -c "$run_node" "$NODES" "$NODE_RANK" "${torchrun[@]}" "$@"
