"""From a data set to batches on the device, the copy overlapping the work on the batch before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from util.errors import UserError
from util.nested_tensor import NestedTensor

Batch = tuple[NestedTensor, list[dict[str, Tensor]]]


def build_loader(dataset: Dataset, batches: Sampler[list[int]], num_workers: int, device: torch.device) -> Prefetcher:
    """An iterable of (NestedTensor, targets) on `device`."""
    loader = DataLoader(
        ErrorsAsItems(dataset),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        # otherwise starting an epoch would draw from the generator that dropout uses
        generator=torch.Generator(),
    )
    return Prefetcher(loader, device)


class ErrorsAsItems(Dataset):
    """A data set that gives a UserError instead of raising it: raised in a worker, it would arrive as a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except UserError as error:
            return error


def collate(items: list[Any]) -> Batch | UserError:
    """(image, target) items to a batch, padded; or the first error among them."""
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return errors[0]
    images, targets = zip(*items, strict=True)
    return NestedTensor.from_images(images), list(targets)


class Prefetcher:
    """The batches of a loader on a device. On CUDA the next batch is copied on a stream of its own."""

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return self._overlapped() if self._device.type == "cuda" else self._plain()

    def _plain(self) -> Iterator[Batch]:
        for images, targets in self._batches():
            yield images.to(self._device), _move(targets, self._device)

    def _overlapped(self) -> Iterator[Batch]:
        copies = torch.cuda.Stream(self._device)
        waiting: Batch | None = None
        for images, targets in self._batches():
            with torch.cuda.stream(copies):
                following = images.to(self._device, non_blocking=True), _move(targets, self._device)
            if waiting is not None:
                yield self._arrived(waiting, copies)
            waiting = following
        if waiting is not None:
            yield self._arrived(waiting, copies)

    def _batches(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _arrived(self, batch: Batch, copies: torch.cuda.Stream) -> Batch:
        """Make the device's main stream wait for the copy, and keep the memory until that stream is done with it."""
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(copies)
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
