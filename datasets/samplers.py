"""Which process takes which images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from util.errors import UserError


class TrainBatches(Sampler[list[int]]):
    """Shuffled batches of an epoch, the same number for every process.

    Images that do not fill a step are left out; they differ from epoch to epoch. The order depends
    on seed and epoch alone: for any number of processes, the first `batch_size x processes` indices
    are the first step, and process r takes the r-th batch of them.

    Raises:
        UserError: there are fewer images than one step takes.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        # an epoch without a step would train nothing
        step = batch_size * world_size
        if num_images < step:
            raise UserError(
                f"{num_images} training images are fewer than the {step} of one step (--batch_size "
                f"{batch_size} x {world_size} processes); lower --batch_size or start fewer processes"
            )
        # set by the training loop; the second is above 0 if an epoch is resumed
        self.epoch, self.first_image = 0, 0
        self.images_per_step = step
        self._num_images, self._batch_size, self._rank, self._seed = num_images, batch_size, rank, seed

    @property
    def images(self) -> int:
        """Number of images in the steps of a whole epoch."""
        return self._num_images - self._num_images % self.images_per_step

    def __len__(self) -> int:
        """Steps left of the epoch."""
        return (self._num_images - self.first_image) // self.images_per_step

    def __iter__(self) -> Iterator[list[int]]:
        # the factor keeps the orders of neighbouring seeds and epochs apart
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(self._num_images, generator=generator).tolist()
        for step in range(len(self)):
            start = self.first_image + step * self.images_per_step + self._rank * self._batch_size
            yield order[start : start + self._batch_size]


class EvalBatches(Sampler[list[int]]):
    """Batches of neighbouring images, each image in exactly one batch of exactly one process.

    Whole batches are dealt to the processes. Images are padded to the largest of their batch, so with
    the same neighbours every image has the same detections for any number of processes.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int) -> None:
        # process r takes every world_size-th batch from the r-th on
        starts = range(0, num_images, batch_size)[rank::world_size]
        self._batches = [list(range(start, min(start + batch_size, num_images))) for start in starts]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
