"""The loader's processes: what they outlive, what ends them, and what is said of one that died."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from datasets import loader, workers
from datasets.loader import build_loader
from tests.helpers import ROOT, run
from tests.processes import wait_until
from util.errors import SIGNALS, LostProcessError, UserError
from util.images.files import BadImageError

CPU = torch.device("cpu")


class Numbers:
    """Items that hold their index; in item `at` of a loader process, `then` happens first."""

    def __init__(self, count: int = 12, at: int = -1, then=None) -> None:
        self._count, self._at, self._then = count, at, then

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        if index == self._at:
            self._then()
        return torch.full((3, 2, 2), float(index)), {"image_id": torch.tensor([index])}


def singly(count: int = 12) -> list[list[int]]:
    return [[i] for i in range(count)]


def ids(batches) -> list[int]:
    return [targets[0]["image_id"].item() for _, targets in batches]


def test_the_signals_of_a_job_do_not_end_loader_processes():
    batches = iter(build_loader(Numbers(40), singly(40), 2, CPU))
    seen = [next(batches)]
    for process in multiprocessing.active_children():
        for number in SIGNALS:
            os.kill(process.pid, number)
    seen += batches
    assert ids(seen) == list(range(40))


_hit_at_birth = False


def _hit_this_process() -> None:
    if _hit_at_birth:
        for number in SIGNALS:
            os.kill(os.getpid(), number)


os.register_at_fork(after_in_child=_hit_this_process)


def test_not_even_at_their_very_start(monkeypatch):
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr(sys.modules[__name__], "_hit_at_birth", True)
    assert ids(build_loader(Numbers(), singly(), 2, CPU)) == list(range(12))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == held, (
        "the training process hears the signals as before"
    )


def die(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_loader_process_is_told_in_one_line(number):
    with pytest.raises(UserError) as error:
        list(build_loader(Numbers(at=5, then=die(number)), singly(), 2, CPU))
    text = str(error.value)
    assert number.name in text
    assert "--num_workers" in text
    assert "/dev/shm" in text
    assert "\n" not in text


def test_it_is_told_at_the_next_batch_and_not_in_the_midst_of_other_work():
    """PyTorch's own handler would raise wherever the training process happens to be, in a
    checkpoint's writing, say.
    """
    batches = iter(build_loader(Numbers(400), singly(400), 2, CPU))
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    time.sleep(0.2)  # here it would be raised
    with pytest.raises(UserError, match="SIGKILL"):
        list(batches)


def test_a_batch_that_does_not_come_ends_the_run():
    hangs = Numbers(at=3, then=lambda: time.sleep(600))
    with pytest.raises(LostProcessError) as error:
        list(build_loader(hangs, singly(), 2, CPU, timeout=2))
    assert str(error.value).startswith("the loader processes gave no batch for 2 s (--dist_timeout): ")
    assert not multiprocessing.active_children()


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_a_gpu_that_is_busy(workers):
    batches = build_loader(Numbers(40), singly(40), workers, torch.device("cuda", 0))
    for _ in range(3):
        torch.cuda._sleep(10_000_000)
        seen = []
        for images, targets in batches:
            assert images.tensors.is_cuda and targets[0]["image_id"].device == CPU
            seen.append((targets[0]["image_id"].item(), images.tensors.unique().tolist()))
        assert seen == [(i, [float(i)]) for i in range(40)]


def mistake() -> None:
    raise ZeroDivisionError("a bug of ours")


@pytest.mark.parametrize("workers", [0, 2])
def test_bugs_keep_their_traceback(workers):
    with pytest.raises(ZeroDivisionError) as error:
        list(build_loader(Numbers(at=3, then=mistake), singly(), workers, CPU))
    assert workers == 0 or "in mistake" in str(error.value), "the lines of the loader process are shown"


def test_a_full_shared_memory_ends_the_run_instead_of_losing_a_batch(monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match="No space left.*--num_workers"):
        list(build_loader(Numbers(), singly(), 2, CPU))


class Cycle:
    """Garbage that only a collection finds, and that tells who found it."""

    def __init__(self, file) -> None:
        self._self, self._file = self, file

    def __del__(self) -> None:
        with open(self._file, "a") as file:
            file.write(f"{os.getpid()}\n")


def test_loader_processes_leave_the_garbage_they_were_born_with(tmp_path):
    gc.collect()
    gc.disable()
    try:
        Cycle(tmp_path / "pids")
        list(build_loader(Numbers(at=3, then=gc.collect), singly(), 2, CPU))
        assert not (tmp_path / "pids").exists()
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "pids").read_text() == f"{os.getpid()}\n"
    list(build_loader(Numbers(), singly(), 2, CPU))
    assert gc.isenabled()


def test_processes_that_cannot_be_started_are_told_in_one_line(monkeypatch):
    def fork():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UserError, match="Cannot allocate memory.*--num_workers"):
        list(build_loader(Numbers(), singly(), 2, CPU))
    monkeypatch.undo()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGTERM not in held


SMALL_SHARED_MEMORY = """
import torch
from datasets.loader import build_loader
from util.errors import run_as_command

class Large:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return torch.zeros(3, 600, 800), {"image_id": torch.tensor([index])}

run_as_command(lambda: list(build_loader(Large(), [[i, i + 1] for i in range(39)], 2, torch.device("cpu"))))
"""


def test_a_really_small_shared_memory_does_so_too():
    """What PyTorch does about it has changed between versions: a bus error, or a batch that never
    comes.
    """
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=10m tmpfs /dev/shm && exec "$@"', "sh")
    if (
        not shutil.which("unshare")
        or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to mount a small /dev/shm")
    result = run(*mount, sys.executable, "-c", SMALL_SHARED_MEMORY)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "/dev/shm" in last


def test_what_was_skipped_passes_the_pinning_of_memory(monkeypatch):
    """PyTorch rebuilds what a loader gives when it moves it to pinned memory, which takes a GPU."""
    pin_memory = pytest.importorskip(
        "torch.utils.data._utils.pin_memory", reason="a part of PyTorch that may move"
    ).pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: self + 1)
    skipped = [BadImageError("path", "reason", "remedy")]
    images, targets = loader.collate([(torch.zeros(3, 2, 2), {"labels": torch.zeros(1)})])
    pinned = pin_memory(loader.LoadedBatch(images, targets, skipped))
    assert isinstance(pinned, loader.LoadedBatch)
    assert pinned.images.tensors.eq(1).all()
    assert pinned.targets[0]["labels"].eq(1).all()
    assert pinned.errors == skipped
    assert pin_memory(loader.LoadedBatch(None, [], skipped)) == (None, [], skipped)


HANGING = """
import multiprocessing, os, signal, sys, time, torch
from datasets.loader import build_loader
from util.errors import run_as_command

both_hang = multiprocessing.Barrier(2)

class Hangs:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        if both_hang.wait() == 0:
            os.kill(os.getppid(), signal.SIGALRM)
        time.sleep(3600)

def main():
    batches = iter(build_loader(Hangs(), [[0], [1]], 2, torch.device("cpu")))
    next(batches)

def leave(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, leave if sys.argv[1] == "end" else signal.SIG_IGN)
run_as_command(main)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended, or is ended and waits for being asked."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for_the_end_of(pids: list[int]) -> None:
    wait_until(lambda: all(map(gone, pids)), f"of the processes {pids} some have not ended")


def test_the_end_of_the_program_does_not_wait_for_hanging_loader_processes():
    result = run(sys.executable, "-c", HANGING, "end")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    pids = [int(line) for line in result.stdout.split()]
    assert len(pids) == 2
    wait_for_the_end_of(pids)


def test_a_killed_program_leaves_no_hanging_loader_processes():
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, "stay"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as program:
        pids = [int(program.stdout.readline()) for _ in range(2)]
        program.kill()
    wait_for_the_end_of(pids)


def test_an_epoch_that_is_not_finished_leaves_nobody():
    batches = iter(build_loader(Numbers(at=3, then=lambda: time.sleep(3600)), singly(), 2, CPU))
    assert ids([next(batches)]) == [0]
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError):
        list(build_loader(Numbers(at=3, then=mistake), singly(), 2, CPU))
    assert not multiprocessing.active_children(), "not even while the error is looked at"


def test_end_workers_leaves_nobody():
    batches = iter(build_loader(Numbers(at=3, then=lambda: time.sleep(3600)), singly(), 2, CPU))
    assert ids([next(batches)]) == [0]
    assert multiprocessing.active_children()
    workers.end_workers()
    assert not multiprocessing.active_children()
