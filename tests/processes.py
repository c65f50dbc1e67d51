"""Processes of the program: runs in processes forked from one that has loaded the libraries, and
who of a job is who.

Loading them takes seconds a process; forked, a dozen start in one. tests.helpers.run_main starts
the program as a user does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.helpers import PATIENCE, ROOT, environment


def run_main_forked(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """main.py in one process, as tests.helpers.run_main gives it. What libraries read when they are
    loaded `env` can't set.
    """
    return run_forked("main.py", *flags, env=env)


def run_forked(
    script: str, *arguments: str, env: dict[str, str] | None = None, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """A Python script, by its path from the project's root, with this process's environment and one
    thread.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _forked(script, arguments, environment(**(env or {})), out, err)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([script, *arguments], timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(
            [script, *arguments], process.exitcode, out.read_text(), err.read_text()
        )


def run_main_together(
    *flags: str, processes: int, output: Path, timeout: float = PATIENCE, script: str = "main.py"
) -> str:
    """main.py, or another script, with the variables that torchrun sets, one thread a process; gives
    what rank 0 printed.

    Args:
        output: folder for what each process prints.

    Raises:
        AssertionError: a process did not end with 0 in `timeout` seconds; with what it printed
        last.
    """
    output.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    logs = [output / f"process{rank}.txt" for rank in range(processes)]
    workers = []
    for rank, log in enumerate(logs):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        workers.append(
            _forked(script, flags, environment(**{name: str(value) for name, value in own.items()}), log, log)
        )
    for worker in workers:
        worker.start()
    try:
        for worker, log in zip(workers, logs, strict=True):
            worker.join(timeout)
            assert worker.exitcode == 0, (
                f"{log.stem} ended with {worker.exitcode}:\n{log.read_text()[-3000:]}"
            )
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return logs[0].read_text()


def _forked(
    script: str, arguments: tuple[str, ...], variables: dict[str, str], out: Path, err: Path
) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main"])
    return context.Process(target=_become, args=(script, arguments, variables, out, err))


def _become(script: str, arguments: tuple[str, ...], variables: dict[str, str], out: Path, err: Path) -> None:
    """In the new process: become the script."""
    import torch

    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # both may be the same
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        None, force=True
    )  # what the program itself starts is forked, as otherwise
    for category in (FutureWarning, DeprecationWarning):  # as in tests.helpers.environment
        warnings.simplefilter("ignore", category)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def free_port() -> str:
    """Below those that the system gives to whoever asks for any, who could get it before it is used
    here.
    """
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return str(port)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Raises AssertionError with `what` if it does not come."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def variables_of_processes() -> Iterator[tuple[int, int, dict[str, str]]]:
    """(pid, its parent's, environment) of every process that may be looked at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        yield int(folder.name), parent, dict(entry.split("=", 1) for entry in entries if "=" in entry)


def training_processes(launcher: int) -> dict[int, int]:
    """Rank to pid of the training processes that a launcher has started; loader workers are their
    children.
    """
    return {
        int(variables["RANK"]): pid
        for pid, parent, variables in variables_of_processes()
        if parent == launcher and "RANK" in variables
    }
