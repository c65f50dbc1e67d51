"""From a data set to batches on the device.

Items are read and padded to batches in the processes of PyTorch's DataLoader. Ours is what it
leaves open: images that can't be used, signals that reach all processes of a job, and one line for
the user where a process was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from util.errors import LostProcessError, UserError
from util.images.files import BadImageError
from util.nested_tensor import NestedTensor
from util.run.stop import SIGNALS

log = logging.getLogger(__name__)

Item = tuple[Tensor, dict[str, Tensor]]
Batch = tuple[NestedTensor, list[dict[str, Tensor]]]


class Images(Protocol):
    """A data set of (image, target) items. An item may raise BadImageError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


def build_loader(
    dataset: Images,
    batches: Sampler[list[int]],
    num_workers: int,
    device: torch.device,
    bad_images: BadImages | None = None,
    *,
    replace: bool = True,
    timeout: float = 0,
) -> DeviceBatches:
    """An iterable of (NestedTensor, targets) on `device`.

    Args:
        bad_images: what to do about images that can't be used, and the record of it; without it the
            first one ends the run.
        replace: when such images are skipped, the next usable one of the data set takes the place,
            as in training. Otherwise the image is left out, and a batch of such images alone is
            passed over, as in evaluation.
        timeout: seconds after which a batch that does not come from the loader processes ends the
            run. 0: never.
    """
    bad_images = bad_images or BadImages("stop", 0)
    loader = DataLoader(
        LoadedBatches(dataset, bad_images, replace),
        sampler=batches,
        batch_size=None,  # an index of the data set is a whole batch's
        collate_fn=_unchanged,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        timeout=timeout if num_workers else 0,
        worker_init_fn=_begin,
        # otherwise starting an epoch would draw from the generator that dropout uses
        generator=torch.Generator(),
    )
    return DeviceBatches(
        loader, device, bad_images, "replaced by the next usable image" if replace else _LEFT_OUT
    )


_LEFT_OUT = "left out: it counts as an image without detections"


def collate(items: Sequence[Item]) -> Batch:
    """(image, target) items to a batch, padded."""
    images, targets = zip(*items, strict=True)
    return NestedTensor.from_images(images), list(targets)


# ---- images that can't be used


class BadImages:
    """The image files that this process could not use: each is logged once, and more than `limit`
    end the run.

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

    def add(self, skipped: Iterable[BadImageError], consequence: str) -> None:
        """Record what a batch skipped. Raises UserError for more than `limit` different files."""
        for error in skipped:
            if error.path in self._paths:
                continue
            self._paths[error.path] = None
            log.warning("%s %s; %s", error.path, error.reason, consequence)
            if self.count > self.limit:
                raise UserError(
                    f"{self.count} image files can't be used, more than --max_bad_images "
                    f"{self.limit}; the last is {error.path}, which {error.reason}; mend the data "
                    f"or raise --max_bad_images"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"paths": list(self._paths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError if it is not what `state_dict` gave."""
        paths = state.get("paths") if isinstance(state, Mapping) else None
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError(
                "the checkpoint's list of skipped images is damaged; resume from another checkpoint"
            )
        self._paths = dict.fromkeys(paths)

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the records of any number of processes."""
        self.load_state_dict({"paths": [path for state in states for path in state["paths"]]})


class LoadedBatch(NamedTuple):
    """A batch, without images if all of them were left out; and the images that were skipped on the
    way to it.
    """

    images: NestedTensor | None
    targets: list[dict[str, Tensor]]
    skipped: list[BadImageError]


class LoadedBatches(Dataset):
    """The batches of a data set by the indices of their items; DataLoader's processes make them.

    Where bad images are skipped, one is replaced by the item of the next index, modulo their
    number; or, without `replace`, by nothing. So what a batch is depends on its indices and the
    data set's epoch alone.
    """

    def __init__(self, dataset: Images, bad_images: BadImages, replace: bool) -> None:
        self._dataset, self._skip, self._replace = dataset, bad_images.skip, replace
        # if all of these are bad, the limit is passed
        self._tries = min(len(dataset), bad_images.limit + 1) if bad_images.skip and replace else 1

    def __getitem__(self, indices: Sequence[int]) -> LoadedBatch | UserError:
        """A UserError is returned and not raised: from a process of DataLoader it would arrive as
        the text of a traceback.
        """
        try:
            batch = self._load(indices)
            if batch.images is not None and get_worker_info() is not None:
                _share(batch.images, batch.targets)
            return batch
        except UserError as error:
            return error

    def _load(self, indices: Sequence[int]) -> LoadedBatch:
        items: list[Item] = []
        skipped: list[BadImageError] = []
        for index in indices:
            item = self._item(index, skipped)
            if item is not None:
                items.append(item)
        if not items:
            return LoadedBatch(None, [], skipped)
        return LoadedBatch(*collate(items), skipped)

    def _item(self, index: int, skipped: list[BadImageError]) -> Item | None:
        """The item of an index, or what takes its place; what can't be used is added to `skipped`."""
        for step in range(self._tries):
            try:
                return self._dataset[(index + step) % len(self._dataset)]
            except BadImageError as error:
                if not self._skip:
                    raise
                skipped.append(error)
        if not self._replace:
            return None
        last = skipped[-1]
        raise UserError(
            f"{self._tries} images one after another can't be used, the last is {last.path}, which "
            f"{last.reason}; mend the data, "
            "or raise --max_bad_images if there are good ones"
        )


def _unchanged(batch: LoadedBatch | UserError) -> LoadedBatch | UserError:
    return batch


def _share(images: NestedTensor, targets: list[dict[str, Tensor]]) -> None:
    """Move a batch to shared memory. Left to the queue that carries it, a full /dev/shm would lose
    the batch and hang the run.
    """
    tensors = [images.tensors, images.mask]
    for target in targets:
        tensors += target.values()
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise UserError(f"a loader process can't pass on its batch ({error}); {_MORE_MEMORY}") from None


# ---- the loader's processes


_MORE_MEMORY = (
    "lower --num_workers or --batch_size, or give the machine or container more memory and a larger /dev/shm"
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_workers() -> None:
    """Kill the loader processes that are left: Python would end them by SIGTERM, which they ignore,
    and wait for ever.

    Called when the program ends; before, it does no harm.
    """
    _kill(multiprocessing.active_children())


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(
            5
        )  # seconds; a process in a system call that can't be interrupted does not even end by that


atexit.register(end_workers)  # runs before what multiprocessing has registered


def _begin(worker: int) -> None:
    """First thing in a loader process: outlive the signals to all processes of a job, as the
    training process decides when to leave; and end with it however that ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    gc.freeze()
    gc.enable()
    if sys.platform == "linux":
        # a hanging one would not see that its parent (to Linux: the thread that started it) is gone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _from_processes(loader: DataLoader) -> Iterator[LoadedBatch | UserError]:
    """What a pass of the loader gives. Raises UserError if one of its processes was killed; none is
    left at the end.
    """
    before = multiprocessing.active_children()
    try:
        with _undisturbed():
            batches = iter(loader)
    except OSError as error:  # no memory for a process, no room in /dev/shm for a lock, too many open files
        raise UserError(f"loader processes can't be started ({error}); {_MORE_MEMORY}") from None
    processes = [process for process in multiprocessing.active_children() if process not in before]
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
        _kill(processes)  # they are left if the pass was not finished


def _raise_if_killed(processes: Sequence[BaseProcess]) -> None:
    # the connection to a process breaks a moment before the process has ended
    ending = multiprocessing.connection.wait(
        [process.sentinel for process in processes], timeout=1 if processes else 0
    )
    for process in processes:
        if process.sentinel in ending:
            process.join()
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            reason = "--num_workers 0 does without such processes and shows where it happens"
            if name in ("SIGKILL", "SIGBUS"):
                reason = f"probably memory or shared memory ran out; {_MORE_MEMORY}"
            raise UserError(f"loader process {process.pid} was ended by {name}: {reason}") from None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Start processes that no signal of a job hits before they ignore it, and that never collect
    garbage they were born with.

    That would run finalisers a second time, and copy the memory of all annotations to look at them.

    PyTorch's handler of SIGCHLD is taken off: wherever the training process is, in the midst of
    writing a checkpoint say, it raises an error when a loader process dies. `_from_processes` asks
    when it waits for a batch.
    """
    in_main = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if (
            in_main and on_child is not None
        ):  # None: not set from Python, so that PyTorch has not replaced it either
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


# ---- onto the device


class DeviceBatches:
    """The batches of a loader on a device; `bad_images` is the record of the images that could not
    be used.

    The copy to a GPU is asynchronous, from pinned memory, and takes its turn on the GPU's main
    stream: 0.5 ms for two images of 800 x 1333 on an H100 (torch 2.11), too little for a stream of
    its own.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, bad_images: BadImages, consequence: str
    ) -> None:
        self.bad_images = bad_images
        self._loader, self._device, self._consequence = loader, device, consequence

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        left_out = 0
        for batch in _from_processes(self._loader):
            if isinstance(batch, UserError):
                raise batch
            self.bad_images.add(batch.skipped, self._consequence)
            left_out += len(batch.skipped)
            if batch.images is not None:
                images = batch.images.to(self._device, non_blocking=self._loader.pin_memory)
                yield images, [self._moved(target) for target in batch.targets]
        if left_out and self._consequence == _LEFT_OUT:
            log.warning(
                "%d images of this pass were left out; they count as images without detections", left_out
            )

    def _moved(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        """A target on the device, but for its `image_id`, which only the host asks for."""
        moved = dict(target)
        for name in target.keys() - {"image_id"}:
            moved[name] = target[name].to(self._device, non_blocking=self._loader.pin_memory)
        return moved
