"""From a data set to batches on the device, the copy overlapping the work on the batch before."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from util.errors import UserError
from util.images import BadImageError
from util.nested_tensor import NestedTensor

log = logging.getLogger(__name__)

Batch = tuple[NestedTensor, list[dict[str, Tensor]]]


class Images(Protocol):
    """A data set of (image, target) items. An item may raise BadImageError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]: ...


def build_loader(
    dataset: Images, batches: Sampler[list[int]], num_workers: int, device: torch.device, bad_images: BadImages | None = None,
    *, replace: bool = True,
) -> Prefetcher:  # fmt: skip
    """An iterable of (NestedTensor, targets) on `device`.

    Args:
        bad_images: what to do about images that can't be used, and the record of it; without it the first one ends the run.
        replace: when such images are skipped, the next usable one of the data set takes the place, as in training. Otherwise the
            image is left out, and a batch of such images alone is passed over, as in evaluation.
    """
    bad_images = bad_images or BadImages("stop", 0)
    loader = DataLoader(
        GuardedItems(dataset, bad_images, replace),
        batch_sampler=batches,
        collate_fn=_collate_guarded,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin,
        # otherwise starting an epoch would draw from the generator that dropout uses
        generator=torch.Generator(),
    )
    return Prefetcher(loader, device, bad_images, "replaced by the next usable image" if replace else _LEFT_OUT)


_LEFT_OUT = "left out: it counts as an image without detections"


def collate(items: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    """(image, target) items to a batch, padded."""
    images, targets = zip(*items, strict=True)
    return NestedTensor.from_images(images), list(targets)


# ---- images that can't be used


class BadImages:
    """The image files that this process could not use: each is logged once, and more than `limit` end the run.

    Args:
        on_bad_image: "stop": the first one ends the run; or "skip".
        limit: --max_bad_images.
    """

    def __init__(self, on_bad_image: str, limit: int) -> None:
        self.skip, self.limit = on_bad_image == "skip", limit
        self._paths: dict[str, None] = {}  # in the order they were met

    @property
    def count(self) -> int:
        """Different files skipped so far, before a resume too."""
        return len(self._paths)

    def add(self, skipped: Sequence[Skipped], consequence: str) -> None:
        """Record what a batch skipped. Raises UserError for more than `limit` different files."""
        for path, reason in skipped:
            if path in self._paths:
                continue
            self._paths[path] = None
            log.warning("%s %s; %s", path, reason, consequence)
            if self.count > self.limit:
                raise UserError(
                    f"{self.count} image files can't be used, more than --max_bad_images {self.limit}; the last is {path}, which "
                    f"{reason}; mend the data or raise --max_bad_images"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"paths": list(self._paths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError if it is not what `state_dict` gave."""
        paths = state.get("paths") if isinstance(state, Mapping) else None
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError("the checkpoint's list of skipped images is damaged; resume from another checkpoint")
        self._paths = dict.fromkeys(paths)

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the records of any number of processes."""
        self.load_state_dict({"paths": [path for state in states for path in state["paths"]]})


class Skipped(NamedTuple):
    """A file that was not used. To be read together: "<path> <reason>"."""

    path: str
    reason: str


class Item(NamedTuple):
    """An (image, target) item, None if there is none; and what was skipped on the way to it."""

    content: tuple[Tensor, dict[str, Tensor]] | None
    skipped: list[Skipped]


class GuardedItems(Dataset):
    """Items of a data set, with a UserError as an item instead of raised: from a worker it would arrive as a traceback.

    Where bad images are skipped, one is replaced by the item of the next index, modulo their number; or, without `replace`, by
    nothing. So what an item is depends on its index and the data set's epoch alone.
    """

    def __init__(self, dataset: Images, bad_images: BadImages, replace: bool) -> None:
        self._dataset, self._skip, self._replace = dataset, bad_images.skip, replace
        # if all of these are bad, the limit is passed
        self._tries = min(len(dataset), bad_images.limit + 1) if bad_images.skip and replace else 1

    def __getitem__(self, index: int) -> Item | UserError:
        skipped: list[Skipped] = []
        for step in range(self._tries):
            try:
                return Item(self._dataset[(index + step) % len(self._dataset)], skipped)
            except BadImageError as error:
                if not self._skip:
                    return error
                skipped.append(Skipped(error.path, error.reason))
            except UserError as error:
                return error
        if not self._replace:
            return Item(None, skipped)
        path, reason = skipped[-1]
        return UserError(
            f"{len(skipped)} images one after another can't be used, the last is {path}, which {reason}; mend the data, or raise "
            "--max_bad_images if there are good ones"
        )


class Collated(NamedTuple):
    """A batch, without images if all of them were left out; and what was skipped on the way to it."""

    images: NestedTensor | None
    targets: list[dict[str, Tensor]]
    skipped: list[Skipped]


def _collate_guarded(items: list[Item | UserError]) -> Collated | UserError:
    """Guarded items to a batch; or the first error among them."""
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return errors[0]
    contents = [item.content for item in items if item.content is not None]
    skipped = [one for item in items for one in item.skipped]
    if not contents:
        return Collated(None, [], skipped)
    images, targets = collate(contents)
    if get_worker_info() is not None:
        try:
            _share(images, targets)
        except RuntimeError as error:
            return UserError(f"a loader process can't pass on its batch ({error}); {_MORE_MEMORY}")
    return Collated(images, targets, skipped)


def _share(images: NestedTensor, targets: list[dict[str, Tensor]]) -> None:
    """Move a batch to shared memory. Left to the queue that carries it, a full /dev/shm would lose the batch and hang the run."""
    for tensor in (images.tensors, images.mask, *(value for target in targets for value in target.values())):
        tensor.share_memory_()


# ---- the loader's processes


_MORE_MEMORY = "lower --num_workers or --batch_size, or give the machine or container more memory and a larger /dev/shm"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# what schedulers and keyboards send to every process of a job; the training process decides when to leave
_SIGNALS_OF_A_JOB = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def end_workers() -> None:
    """Kill the loader processes that are left: they ignore the signal by which Python would end them at its own end, and wait.

    Called when the program ends; before, it does no harm.
    """
    _kill(multiprocessing.active_children())


def _kill(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)  # seconds; a process in a system call that can't be interrupted does not even end by that


atexit.register(end_workers)  # runs before what multiprocessing has registered


def _begin(worker: int) -> None:
    """First thing in a loader process: outlive the signals of a job, and end with the training process however that ends."""
    for number in _SIGNALS_OF_A_JOB:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS_OF_A_JOB)
    gc.freeze()
    gc.enable()
    if sys.platform == "linux":
        # a hanging one would not see that its parent (to Linux: the thread that started it) is gone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Workers:
    """A loader's iterator with its processes: one that was killed ends the run with one line."""

    def __init__(self, loader: DataLoader) -> None:
        before = multiprocessing.active_children()
        try:
            with _undisturbed():
                self._iterator = iter(loader)
        except OSError as error:  # no memory for a process, no room in /dev/shm for a lock, too many open files
            raise UserError(f"loader processes can't be started ({error}); {_MORE_MEMORY}") from None
        self._processes = [process for process in multiprocessing.active_children() if process not in before]

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._iterator
        except Exception:
            self._raise_if_killed()
            raise
        finally:
            # those that are left when the epoch was not finished: PyTorch ends them when the garbage collector comes by
            _kill(self._processes)

    def _raise_if_killed(self) -> None:
        # the connection to a process breaks a moment before the process has ended
        seconds = 1 if self._processes else 0
        ending = multiprocessing.connection.wait([process.sentinel for process in self._processes], seconds)
        for process in self._processes:
            if process.sentinel in ending:
                process.join()
            if process.exitcode is not None and process.exitcode < 0:
                raise UserError(_killed(process.pid, -process.exitcode)) from None


def _killed(pid: int | None, number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number in (signal.SIGKILL, signal.SIGBUS):
        return f"loader process {pid} was killed by {name}: probably memory or shared memory ran out; {_MORE_MEMORY}"
    return f"loader process {pid} was ended by {name}; --num_workers 0 does without such processes and shows where it happens"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Start processes that no signal of a job hits before they ignore it, and that never collect garbage they were born with.

    That would run finalisers a second time, those of other loaders too; and to look at all annotations copies their memory.

    PyTorch's handler is taken off by which the training process would hear of a process that died in the midst of anything it
    does. `Workers` asks when it waits for a batch.
    """
    in_main = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_A_JOB)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if in_main and on_child is not None:  # None: not set from Python, so that PyTorch has not replaced it either
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


# ---- onto the device


class Prefetcher:
    """The batches of a loader on a device. On CUDA the next batch is copied on a stream of its own.

    `bad_images` is the record of the images that could not be used.
    """

    def __init__(self, loader: DataLoader, device: torch.device, bad_images: BadImages, consequence: str) -> None:
        self.bad_images = bad_images
        self._loader, self._device, self._consequence = loader, device, consequence
        # one for all epochs: every stream has memory of its own that PyTorch keeps
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return self._overlapped(self._copies) if self._copies else self._plain()

    def _plain(self) -> Iterator[Batch]:
        for images, targets in self._batches():
            yield images.to(self._device), _move(targets, self._device)

    def _overlapped(self, copies: torch.cuda.Stream) -> Iterator[Batch]:
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        for images, targets in self._batches():
            with torch.cuda.stream(copies):
                following = images.to(self._device, non_blocking=True), _move(targets, self._device)
            copied = copies.record_event()
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = following, copied
        if waiting is not None:
            yield self._arrived(*waiting)

    def _batches(self) -> Iterator[Batch]:
        left_out = 0
        for batch in Workers(self._loader):
            if isinstance(batch, UserError):
                raise batch
            self.bad_images.add(batch.skipped, self._consequence)
            left_out += len(batch.skipped)
            if batch.images is not None:
                yield batch.images, batch.targets
        if left_out and self._consequence == _LEFT_OUT:
            log.warning("%d images of this pass were left out; they count as images without detections", left_out)

    def _arrived(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """Make the device's main stream wait for this batch's copy, and keep the memory until that stream is done with it."""
        main = torch.cuda.current_stream(self._device)
        main.wait_event(copied)  # the whole stream would mean waiting for the next batch, too
        images, targets = batch
        for tensor in (images.tensors, images.mask, *(value for target in targets for value in target.values())):
            tensor.record_stream(main)
        return batch


_STAYS_ON_HOST = ("image_id",)


def _move(targets: list[dict[str, Any]], device: torch.device) -> list[dict[str, Tensor]]:
    """Targets on the device; what only the host asks for stays there."""
    return [
        {name: value if name in _STAYS_ON_HOST else value.to(device, non_blocking=True) for name, value in target.items()}
        for target in targets
    ]
