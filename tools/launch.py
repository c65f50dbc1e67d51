"""Run a node's processes under PyTorch's elastic launcher: variables to its options, its exceptions
to one line and a code.
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

from util.errors import EXIT_INTERRUPTED, EXIT_LOST_PROCESS, EXIT_PREEMPTED, EXIT_USER_ERROR

# unless ignored, as by nohup
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SAVED = ({EXIT_PREEMPTED}, {EXIT_INTERRUPTED})
ANSWER_SECONDS = 30  # in which node 0 must answer the launcher of another node


def main(nodes: int, node: int, processes: int, command: list[str]) -> int:
    address, port = (
        os.environ["MASTER_ADDR"],
        int(os.environ.get("MASTER_PORT", 0)),
    )  # 0: any port of one node
    join_seconds, restarts = int(os.environ.get("JOIN_SECONDS", 1800)), int(os.environ.get("MAX_RESTARTS", 0))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("PREEMPT_SECONDS", "120")
    # A store in the launcher would keep the keys of the processes before a restart (PyTorch issue
    # 135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # what ends the job is said below
    logging.disable(logging.WARNING if restarts else logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="run_dist_launch") as notes:
        try:
            config = LaunchConfig(
                *(nodes, nodes, processes),  # at least, at most, on each
                run_id="run_dist_launch",
                rdzv_backend="c10d",
                rdzv_endpoint=f"{address}:{port}",
                rdzv_configs={
                    "is_host": node == 0,
                    "join_timeout": join_seconds,
                    "read_timeout": ANSWER_SECONDS,
                },
                max_restarts=restarts,
                local_addr=reach_node_0(address, port, join_seconds) if node else address,
                logs_specs=DefaultLogsSpecs(log_dir=notes),
                signals_to_handle=",".join(
                    s for s in SIGNALS if signal.getsignal(getattr(signal, s)) != signal.SIG_IGN
                ),
            )
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as error:
            ends = max(Path(notes).glob("*/attempt_*"), key=os.path.getmtime).glob("*/error.json")
            codes = [json.loads(path.read_text())["message"].get("errorCode") for path in ends]
            what = f"ended by {error.sigval.name}; not every process reported that it had saved"
            return (
                codes[0] if len(codes) == processes and set(codes) in SAVED else say(what, 128 + error.sigval)
            )
        except KeyboardInterrupt:  # before the processes start
            return EXIT_INTERRUPTED
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code, what = failure.exitcode, f"rank {rank} (process {failure.pid})"
            if code < 0:
                return say(f"{what} was killed by {failure.signal_name()}; all others were ended", 128 - code)
            line = failure.message["message"] if isinstance(failure.message, dict) else "see its output above"
            return code if {code} in SAVED else say(f"{what} failed with exit code {code}: {line}", code)
        except OSError as error:
            return say(f"{command[0]} can't be started: {error}", EXIT_USER_ERROR)
        except (RendezvousError, RuntimeError) as error:
            what = (
                f"{nodes} nodes did not meet at {address}:{port} in JOIN_SECONDS={join_seconds}, or lost "
                "each other"
            )
            remedy = f"run the command on all, with a free port in MASTER_PORT ({type(error).__name__})"
            return say(f"{what}: {remedy}", EXIT_LOST_PROCESS)
    return 0


def reach_node_0(address: str, port: int, seconds: float) -> str:
    """Wait for node 0; gives the address from which this node reaches it."""
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
    """Let the system end connections to node 0 that have no answer; the launcher would wait for a
    quarter of an hour.
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
    sys.exit(main(*map(int, sys.argv[1:4]), sys.argv[4:]))
