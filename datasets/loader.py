"""From a data set to batches on the device.

PyTorch's DataLoader reads items and pads them to batches in worker processes. This module adds what
it does not have: images that can't be used (bad_images.py), and workers that survive the signals of
a job (workers.py).

A batch is wrapped once on its way: as a LoadedBatch, from the worker to the training process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from datasets import DetectionData
from datasets.bad_images import LEFT_OUT, REPLACED, BadImages
from datasets.workers import MORE_MEMORY, begin_worker, run_workers
from util.errors import UserError
from util.images.files import BadImageError
from util.nested_tensor import NestedTensor

log = logging.getLogger(__name__)

Item = tuple[Tensor, dict[str, Tensor]]
Batch = tuple[NestedTensor, list[dict[str, Tensor]]]


def build_loader(
    dataset: DetectionData,
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
        batches: gives the indices of the items of each batch.
        bad_images: what to do about images that can't be used, and the record of them. By default
            the first one ends the run.
        replace: the next usable image takes the place of a skipped one, as in training. Otherwise
            the image is left out, as in evaluation, and a batch without any image is passed over.
        timeout: seconds to wait for a batch of the workers before the run ends. 0: no limit.
    """
    bad_images = bad_images or BadImages()
    loader: DataLoader[LoadedBatch] = DataLoader(
        _Batches(dataset, bad_images, replace),
        sampler=batches,
        batch_size=None,  # an index of the data set is a whole batch's
        collate_fn=_unchanged,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        timeout=timeout if num_workers else 0,
        worker_init_fn=begin_worker,
        # otherwise starting an epoch would draw from the generator that dropout uses
        generator=torch.Generator(),
    )
    return DeviceBatches(loader, device, bad_images, replace)


def collate(items: Sequence[Item]) -> Batch:
    """(image, target) items to a batch, padded."""
    # targets have different numbers of objects, so they stay a list
    images, targets = zip(*items, strict=True)
    return NestedTensor.from_images(images), list(targets)


class LoadedBatch(NamedTuple):
    """A batch as a worker sends it.

    images: None if there is no usable image. errors: what went wrong. Errors are sent and not
    raised, because DataLoader would turn one line into the text of a traceback.
    """

    images: NestedTensor | None
    targets: list[dict[str, Tensor]]
    errors: list[UserError]


class _Batches(Dataset):
    """The batches of a data set by the indices of their items. Runs in the workers.

    A bad image that is skipped is replaced by the item of the next index (modulo their number) or,
    without `replace`, by nothing. So a batch depends on its indices and the data set's epoch alone.
    """

    def __init__(self, dataset: DetectionData, bad_images: BadImages, replace: bool) -> None:
        self._dataset, self._skip, self._replace = dataset, bad_images.skip, replace
        self._tries = 1
        if bad_images.skip and replace:
            # one more than the limit: if all of these are bad, the run ends anyway
            self._tries = min(len(dataset), bad_images.limit + 1)

    def __getitem__(self, indices: Sequence[int]) -> LoadedBatch:
        skipped: list[UserError] = []
        try:
            found = [self._item(index, skipped) for index in indices]
            items = [item for item in found if item]
            if not items:
                return LoadedBatch(None, [], skipped)
            # padded in the worker, so that the training process does not wait for it
            images, targets = collate(items)
            if get_worker_info():
                _share(images, targets)
            return LoadedBatch(images, targets, skipped)
        except UserError as error:
            return LoadedBatch(None, [], [error])

    def _item(self, index: int, skipped: list[UserError]) -> Item | None:
        """The item of an index, or its replacement. Errors that were skipped are added to `skipped`."""
        # the item itself, then the next ones
        for step in range(self._tries):
            try:
                return self._dataset[(index + step) % len(self._dataset)]
            except BadImageError as error:
                if not self._skip:
                    raise
                skipped.append(last := error)
        if not self._replace:
            return None
        found = f"the last is {last.path}, which {last.reason}"
        remedy = "mend the data, or raise --max_bad_images if there are good ones"
        raise UserError(f"{self._tries} images one after another can't be used, {found}; {remedy}")


def _unchanged(batch: Any) -> Any:
    return batch


def _share(images: NestedTensor, targets: Sequence[dict[str, Tensor]]) -> None:
    """Move a batch to shared memory.

    The queue would do that too, but with a full /dev/shm it loses the batch and the run hangs.
    """
    # all tensors of the batch
    tensors = [images.tensors, images.mask]
    for target in targets:
        tensors += target.values()
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise UserError(f"a loader process can't pass on its batch ({error}); {MORE_MEMORY}") from None


@dataclass
class DeviceBatches:
    """The batches of a loader on a device. `bad_images` is the record of images that were skipped.

    The copy to a GPU is asynchronous, from pinned memory, on the GPU's main stream. It takes 0.5 ms
    for two images of 800 x 1333 on an H100 (torch 2.11), too little for a stream of its own.
    """

    loader: DataLoader[LoadedBatch]
    device: torch.device
    bad_images: BadImages
    replace: bool

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # errors are recorded here, because a worker does not see those of the other workers
        consequence = REPLACED if self.replace else LEFT_OUT
        left_out = 0
        for images, targets, errors in run_workers(self.loader):
            self.bad_images.add(errors, consequence)
            left_out += len(errors)
            # None: all images of the batch were left out
            if images is not None:
                yield self.on_device(images, targets)
        if left_out and not self.replace:
            log.warning(
                "%d images of this pass were left out; they count as images without detections", left_out
            )

    def on_device(self, images: NestedTensor, targets: list[dict[str, Tensor]]) -> Batch:
        """A batch of the loader, copied to the device."""
        images = images.to(self.device, non_blocking=self.loader.pin_memory)
        return images, [self._moved(target) for target in targets]

    def _moved(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        """A target on the device, except `image_id`, which only the host reads."""
        # reading it from a GPU would synchronise
        moved = dict(target)
        for name in target.keys() - {"image_id"}:
            moved[name] = target[name].to(self.device, non_blocking=self.loader.pin_memory)
        return moved
