"""Run the processes of a node under PyTorch's elastic launcher: environment variables become its
options, its exceptions become one line and an exit code. tools/run_dist_launch.sh calls it.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from util.distributed.launchers import number
from util.errors import EXIT_INTERRUPTED, EXIT_LOST_PROCESS, EXIT_PREEMPTED, EXIT_USER_ERROR

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SAVED = (EXIT_PREEMPTED, EXIT_INTERRUPTED)
ANSWER_SECONDS = 30  # in which node 0 must answer the launcher of another node


def main(nodes: int, node: int, processes: int, command: list[str]) -> int:
    """Run `command` as `processes` processes of this node; the exit code of the job."""
    endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', 0)}"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("PREEMPT_SECONDS", "120")
    # a store in the launcher would keep the keys of earlier processes (PyTorch issue 135712)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    restarts, join_seconds = number("MAX_RESTARTS"), number("JOIN_SECONDS", 1800)
    # what this process ignores stays ignored, as under nohup
    handled = [name for name in SIGNALS if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
    # the lines below say what ends the job; PyTorch's say why it starts again
    logging.disable(logging.WARNING if restarts else logging.CRITICAL)

    with tempfile.TemporaryDirectory(prefix="run_dist_launch") as notes:
        try:
            config = LaunchConfig(
                min_nodes=nodes,
                max_nodes=nodes,
                nproc_per_node=processes,
                run_id="run_dist_launch",
                rdzv_backend="c10d",
                rdzv_endpoint=endpoint,
                rdzv_configs={
                    "is_host": node == 0,
                    "join_timeout": join_seconds,
                    "read_timeout": ANSWER_SECONDS,
                },
                max_restarts=restarts,
                local_addr=address_of_this_node(node, join_seconds),
                logs_specs=DefaultLogsSpecs(log_dir=notes),
                signals_to_handle=",".join(handled),
            )
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as error:
            return after_signal(error.sigval, Path(notes), processes)
        except KeyboardInterrupt:  # before the processes start
            return EXIT_INTERRUPTED
        except ChildFailedError as error:
            return after_failure(error)
        except OSError as error:
            return say(f"{command[0]} can't be started: {error}", EXIT_USER_ERROR)
        except (RendezvousError, RuntimeError) as error:
            message = (
                f"{nodes} nodes did not meet at {endpoint} in JOIN_SECONDS={join_seconds}, or lost each "
                "other: run the command on all, with a free port in MASTER_PORT "
                f"({type(error).__name__})"
            )
            return say(message, EXIT_LOST_PROCESS)
    return 0


def after_signal(number: signal.Signals, notes: Path, processes: int) -> int:
    """The exit code after a signal to the launcher: that of the processes if all have saved."""
    attempt = max(notes.glob("*/attempt_*"), key=os.path.getmtime)
    # only processes that end with a line of their own leave a file
    codes = []
    for path in attempt.glob("*/error.json"):
        codes.append(json.loads(path.read_text())["message"].get("errorCode"))
    if len(codes) == processes and len(set(codes)) == 1 and codes[0] in SAVED:
        return codes[0]
    return say(f"ended by {number.name}; not every process reported that it had saved", 128 + number)


def after_failure(error: ChildFailedError) -> int:
    """The exit code after the end of a process: that of the first one that ended."""
    rank, failure = error.get_first_failure()
    code, process = failure.exitcode, f"rank {rank} (process {failure.pid})"
    if code in SAVED:  # it was asked to leave: that is no failure
        return code
    if code < 0:
        return say(f"{process} was killed by {failure.signal_name()}; all others were ended", 128 - code)
    # our commands leave their last line; others do not
    line = "see its output above"
    if isinstance(failure.message, dict):
        line = failure.message["message"]
    return say(f"{process} failed with exit code {code}: {line}", code)


def address_of_this_node(node: int, seconds: float) -> str:
    """The address from which this node reaches node 0; waits until node 0 is there."""
    address, port = os.environ["MASTER_ADDR"], number("MASTER_PORT")
    if node == 0:
        return address
    # the nodes of a job need not start at the same time
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                threading.Thread(target=limit_silence, args=(port,), daemon=True).start()
                return connection.getsockname()[0]
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(str(error)) from None
        time.sleep(0.2)


def limit_silence(port: int) -> None:
    """Make the system end connections to node 0 that get no answer. The launcher itself would wait
    for a quarter of an hour.
    """
    time.sleep(ANSWER_SECONDS / 3)  # until the launcher has opened them
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as connection:
            if connection.getpeername()[1] == port:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * ANSWER_SECONDS)


def say(message: str, code: int) -> int:
    print("run_dist_launch.sh:", message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
