"""Images of different sizes in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NestedTensor:
    """A batch padded at the right and the bottom.

    tensors: [B, 3, H, W], floats or uint8, zero on padding; mask: [B, H, W] bool, True on padding.
    """

    tensors: Tensor
    mask: Tensor

    @staticmethod
    def from_images(images: Sequence[Tensor]) -> NestedTensor:
        """A list of [3, h, w] images, padded to the largest h and w among them.

        Raises ValueError if they have several dtypes.
        """
        if len(dtypes := {image.dtype for image in images}) > 1:
            raise ValueError(f"the images of a batch have {len(dtypes)} dtypes: {dtypes}")
        height = max(image.shape[-2] for image in images)
        width = max(image.shape[-1] for image in images)
        # all of it is padding, until an image is copied into its corner; channels lie beside each
        # other where they do in the images, as decoders give them
        tensors = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        if images[0].stride(0) == 1:
            tensors = tensors.contiguous(memory_format=torch.channels_last)
        mask = torch.ones(len(images), height, width, dtype=torch.bool, device=tensors.device)
        for image, row, row_mask in zip(images, tensors, mask, strict=True):
            h, w = image.shape[-2:]
            row[:, :h, :w].copy_(image)
            row_mask[:h, :w] = False
        return NestedTensor(tensors, mask)

    def padded_to(self, height: int, width: int) -> NestedTensor:
        """With padding up to this height and width in pixels; they must not be smaller."""
        right_and_below = (0, width - self.mask.shape[2], 0, height - self.mask.shape[1])
        tensors = F.pad(self.tensors, right_and_below)
        return NestedTensor(tensors, F.pad(self.mask, right_and_below, value=True))

    def to(self, device: torch.device, non_blocking: bool = False) -> NestedTensor:
        tensors = self.tensors.to(device, non_blocking=non_blocking)
        return NestedTensor(tensors, self.mask.to(device, non_blocking=non_blocking))

    # DataLoader calls it by this name
    def pin_memory(self) -> NestedTensor:
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())

    def __len__(self) -> int:
        return len(self.tensors)
