"""The worker processes of a DataLoader: how they start, what signals they ignore, how they end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TypeVar

from torch.utils.data import DataLoader

from util.allocator import keep_freed_memory
from util.errors import SIGNALS, LostProcessError, UserError

Batch = TypeVar("Batch")

MORE_MEMORY = (
    "lower --num_workers or --batch_size, or give the machine or container more memory and a larger /dev/shm"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_workers() -> None:
    """Kill the workers that are left. Safe to call at any time.

    Python itself would send SIGTERM, which they ignore, and then wait forever.
    """
    _kill(multiprocessing.active_children())


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        # seconds: a process in an uninterruptible system call does not end even by SIGKILL
        process.join(5)


atexit.register(end_workers)  # runs before what multiprocessing has registered


def begin_worker(worker: int) -> None:
    """First thing in a worker: ignore the signals of a job, and end when the training process ends.

    Schedulers send signals to every process of a job, but the training process decides when to exit.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    keep_freed_memory()
    # objects of the training process are never collected here, see _undisturbed
    gc.freeze()
    gc.enable()
    if sys.platform == "linux":
        # a hanging worker would not notice that its parent (for Linux: the thread that started it)
        # has ended
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_workers(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The batches of one pass of a loader. No worker is left at its end.

    Raises:
        UserError: the workers can't be started, or one was killed.
        LostProcessError: no batch came within the loader's timeout.
    """
    # start the workers, and remember which processes are theirs
    before = multiprocessing.active_children()
    try:
        with _undisturbed():
            batches = iter(loader)
    except OSError as error:  # no memory, no space in /dev/shm, or too many open files
        raise UserError(f"loader processes can't be started ({error}); {MORE_MEMORY}") from None
    processes = [process for process in multiprocessing.active_children() if process not in before]

    # pass on their batches; explain why none comes
    try:
        yield from batches
    except Exception as error:
        _raise_if_killed(processes)
        if str(error).startswith("DataLoader timed out"):
            raise LostProcessError(
                f"the loader processes gave no batch for {loader.timeout:.0f} s (--dist_timeout): "
                f"does the file system of the "
                "images hang? start again with --resume auto"
            ) from None
        raise
    finally:
        _kill(processes)  # some are left if the pass was not finished


def _raise_if_killed(processes: Sequence[BaseProcess]) -> None:
    if not processes:
        return
    # a worker's connection breaks shortly before the process has ended
    sentinels = [process.sentinel for process in processes]
    ended = multiprocessing.connection.wait(sentinels, timeout=1)

    for process in processes:
        if process.sentinel in ended:
            process.join()  # otherwise its exit code may not be known yet
        code = process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            reason = "--num_workers 0 does without such processes and shows where it happens"
            if name in ("SIGKILL", "SIGBUS"):
                reason = f"probably memory or shared memory ran out; {MORE_MEMORY}"
            raise UserError(f"loader process {process.pid} was ended by {name}: {reason}") from None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The block in which workers are started.

    Signals are blocked, so that none arrives before the workers ignore it. Garbage collection is off:
    in a worker it would run finalisers a second time, and copy the memory of all annotations.

    Afterwards PyTorch's handler of SIGCHLD is removed. When a worker dies it raises an error wherever
    the training process is, for example while it writes a checkpoint. `run_workers` checks for dead
    workers when it waits for a batch.
    """
    on_child = signal.getsignal(signal.SIGCHLD)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        in_main = threading.current_thread() is threading.main_thread()
        # None: the handler was not set from Python, so PyTorch has not replaced it either
        if in_main and on_child is not None:
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
