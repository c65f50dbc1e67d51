"""Runs of main.py in processes forked from one that has loaded the libraries: a dozen start in a second.

tests.helpers.run_main starts the program as a user does, which takes seconds a process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

from tests.helpers import ROOT


def run_main_together(*flags: str, processes: int, output: Path, timeout: float = 300) -> str:
    """main.py with the variables that torchrun sets, one thread a process; gives what rank 0 printed.

    Args:
        output: folder for what each process prints.

    Raises:
        AssertionError: a process did not end with 0 in `timeout` seconds; with what it printed last.
    """
    output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main"])
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    logs = [output / f"process{rank}.txt" for rank in range(processes)]
    workers = [
        context.Process(target=_run, args=(flags, shared | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}, log))
        for rank, log in enumerate(logs)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker, log in zip(workers, logs, strict=True):
            worker.join(timeout)
            assert worker.exitcode == 0, f"{log.stem} ended with {worker.exitcode}:\n{log.read_text()[-3000:]}"
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return logs[0].read_text()


def _run(flags: tuple[str, ...], variables: dict[str, object], log: Path) -> None:
    """In the new process: become main.py."""
    import torch

    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.chdir(ROOT)
    sys.argv = ["main.py", *flags]
    runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
