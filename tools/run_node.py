"""torchrun for one node, with two additions; tools/run_dist_launch.sh calls it.

torchrun ends the processes of its own node only, and the other nodes would wait until an exchange times out. So a node that
fails says so in the rendezvous store, which node 0 serves, and the others look there. And the first failure is told
in one line with its own exit status, not as a traceback of the launcher.

    python tools/run_node.py <nodes> <this node> <arguments of torchrun>
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import DistNetworkError, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

FAILED = "failed_node"  # key in the store: the number of the node that failed first


def main(nodes: int, node: str, arguments: list[str]) -> int:
    """Run the node's processes; gives the exit status."""
    if nodes == 1:
        return run_processes(arguments)
    status: queue.SimpleQueue[int] = queue.SimpleQueue()
    watch = threading.Thread(target=end_with_other_nodes, args=[node, status], daemon=True)
    watch.start()
    code = run_processes(arguments)
    status.put(code)
    watch.join(5)
    return code


def run_processes(arguments: list[str]) -> int:
    """torchrun; its failures become one line and an exit status."""
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        return report_failure(error)
    except SignalException as error:
        say(f"ended by {error.sigval.name}")
        return 128 + error.sigval
    except DistNetworkError as error:
        say(str(error).splitlines()[0])
        return 1
    return 0


def report_failure(error: ChildFailedError) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        say(f"rank {rank} failed with exit status {failure.exitcode}, see its message above; all others were ended")
        return failure.exitcode
    memory = " (is the memory exhausted?)" if failure.exitcode == -signal.SIGKILL else ""
    say(f"rank {rank} was killed by {failure.signal_name()}{memory}; all others were ended")
    return 128 - failure.exitcode


def end_with_other_nodes(node: str, status: queue.SimpleQueue[int]) -> None:
    """Until this node's `status` is known, end it if another has failed; then tell the others if this one has."""
    try:
        failed = first_failed_node(node, status)
    except RuntimeError:  # the store is gone
        with contextlib.suppress(queue.Empty):
            status.get(timeout=10)  # node 0 may be the first to leave when all is done
            return
        failed = "0"
    if failed is None:
        return
    if failed != node and status.empty():
        say(f"node {failed} failed, see its output; ending node {node}")
        os.kill(os.getpid(), signal.SIGTERM)
    if node == "0":
        time.sleep(2)  # until all have seen it


def first_failed_node(node: str, status: queue.SimpleQueue[int]) -> str | None:
    """Wait for the first node to fail; None if this one ends well before."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(
        *address,
        timeout=timedelta(days=1),  # torchrun gives up on node 0 long before
        is_master=node == "0",
        multi_tenant=True,
        wait_for_workers=False,
    )
    while not store.check([FAILED]):
        with contextlib.suppress(queue.Empty):
            if status.get(timeout=1) == 0:
                return None
            store.set(FAILED, node)
    return store.get(FAILED).decode()


def say(message: str) -> None:
    print("run_dist_launch.sh:", message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
