"""Run the processes of one node under PyTorch's elastic launcher, the engine of torchrun.

    python tools/launch.py <nodes> <this node> <processes> <command> [arguments]

tools/run_dist_launch.sh calls this program. The launcher starts, watches, ends and restarts the processes. This program
translates: environment variables to the launcher's options, and the launcher's exceptions to one line and an exit code.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder, not the project
from util.errors import EXIT_INTERRUPTED, EXIT_LOST_PROCESS, EXIT_PREEMPTED


def main(nodes: int, node: int, processes: int, command: list[str]) -> int:
    """Run `command` as `processes` processes of this node; gives the exit code."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", 0))
    seconds = int(os.environ.get("JOIN_SECONDS", 1800))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = os.environ.get("PREEMPT_SECONDS", "120")
    # A store in the launcher would keep the keys of the processes before a restart (PyTorch issue 135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    restarts = int(os.environ.get("MAX_RESTARTS", 0))
    logging.disable(logging.WARNING if restarts else logging.CRITICAL)  # without restarts its errors are said below
    with tempfile.TemporaryDirectory(prefix="run_dist_launch") as notes:
        try:
            config = LaunchConfig(
                min_nodes=nodes,
                max_nodes=nodes,
                nproc_per_node=processes,
                run_id="run_dist_launch",
                rdzv_backend="c10d",
                rdzv_endpoint=f"{address}:{port}",
                rdzv_configs={"is_host": node == 0, "join_timeout": seconds, "read_timeout": 30},
                max_restarts=restarts,
                local_addr=own_address(address, port, seconds) if node else address,
                logs_specs=DefaultLogsSpecs(log_dir=notes),
                signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
            )
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as error:
            return after_signal(error.sigval, processes, Path(notes))
        except KeyboardInterrupt:  # before the processes were started
            return EXIT_INTERRUPTED
        except ChildFailedError as error:
            return after_failure(error)
        except (RendezvousError, OSError) as error:
            where = f"the {nodes} nodes of the job did not meet at {address}:{port}, or lost each other"
            what = "run the same command on all nodes, with MASTER_ADDR and a free MASTER_PORT of node 0"
            say(f"{where}: {what}; a node waits JOIN_SECONDS={seconds} ({type(error).__name__}: {error})")
            return EXIT_LOST_PROCESS
    return 0


def own_address(address: str, port: int, seconds: float) -> str:
    """The address by which this node reaches node 0. Waits for node 0; raises OSError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                return connection.getsockname()[0]
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def after_signal(number: signal.Signals, processes: int, notes: Path) -> int:
    """75 or 130 if all processes left so, which they write into the launcher's error files; else 128 + signal."""
    attempt = max(notes.glob("*/attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    codes = [json.loads(path.read_text())["message"]["errorCode"] for path in attempt.glob("*/error.json")]
    if len(codes) == processes and set(codes) in ({EXIT_PREEMPTED}, {EXIT_INTERRUPTED}):
        return codes[0]
    say(f"ended by {number.name}; {processes - len(codes)} of {processes} processes did not report that they have saved")
    return 128 + number


def after_failure(error: ChildFailedError) -> int:
    """Say which process failed first; gives its exit code, or 128 + signal."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        say(f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}; all others were ended")
        return 128 - failure.exitcode
    if failure.exitcode not in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
        line = failure.message["message"] if isinstance(failure.message, dict) else "see its output above"
        say(f"rank {rank} (process {failure.pid}) failed with exit code {failure.exitcode}: {line}")
    return failure.exitcode


def say(message: str) -> None:
    print("run_dist_launch.sh:", message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
