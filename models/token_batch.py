"""The input and output of an encoder layer.

Shape letters: B images of all streams, S tokens of all levels, L levels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of all levels of a batch, and what the encoder needs beside them.

    tokens, position: [B, S, C]; padding_mask: [B, S] bool, True on padding; valid_ratios: [B, L,
    2], width and height of the unpadded part over the padded; reference_points: [B, S, L, 2], the
    centre of each token in every level; spatial_shapes: (height, width) of the levels. With two
    streams the first half of the batch is the plain stream and the second the mixed.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor
    valid_ratios: Tensor
    reference_points: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    num_streams: int = 1

    def with_tokens(self, tokens: Tensor) -> TokenBatch:
        return replace(self, tokens=tokens)

    def doubled(self, mixed: Tensor) -> TokenBatch:
        """Two streams from one: the tokens as they are, then `mixed`."""
        assert self.num_streams == 1

        # both streams have the same images
        def twice(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor])

        return TokenBatch(
            tokens=torch.cat([self.tokens, mixed]),
            position=twice(self.position),
            padding_mask=twice(self.padding_mask),
            valid_ratios=twice(self.valid_ratios),
            reference_points=twice(self.reference_points),
            spatial_shapes=self.spatial_shapes,
            num_streams=2,
        )

    def streams(self) -> tuple[Tensor, Tensor]:
        """The tokens of the plain and of the mixed stream, [B / 2, S, C] each."""
        assert self.num_streams == 2
        plain, mixed = self.tokens.chunk(2)
        return plain, mixed

    def with_streams(self, plain: Tensor, mixed: Tensor) -> TokenBatch:
        return self.with_tokens(torch.cat([plain, mixed]))


def encoder_reference_points(spatial_shapes: tuple[tuple[int, int], ...], valid_ratios_BL2: Tensor) -> Tensor:
    """The centre of every token's pixel, as a point of every (padded) level: [B, S, L, 2]."""
    # in [0, 1] of the unpadded image, then of each padded level
    centres = [
        pixel_centres(shape, valid_ratios_BL2.device)
        / (valid_ratios_BL2[:, None, level] * _size(shape, valid_ratios_BL2))
        for level, shape in enumerate(spatial_shapes)
    ]
    return torch.cat(centres, 1)[:, :, None] * valid_ratios_BL2[:, None]


def pixel_centres(shape: tuple[int, int], device: torch.device) -> Tensor:
    """[H * W, 2]: x + 0.5, y + 0.5 of every pixel, row after row."""
    height, width = shape
    # made on the device
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)


def valid_extent(mask_BHW: Tensor) -> Tensor:
    """[B, 2]: width and height of the unpadded part, in pixels."""
    # padding lies right and below: the first row and the first column tell
    return torch.stack([(~mask_BHW[:, 0]).sum(1), (~mask_BHW[:, :, 0]).sum(1)], -1).float()


def valid_ratio(mask_BHW: Tensor) -> Tensor:
    """[B, 2]: width and height of the unpadded part over the padded."""
    extent = valid_extent(mask_BHW)
    # column by column: a tensor of (width, height) would be a copy from the host
    height, width = mask_BHW.shape[1:]
    return torch.stack([extent[:, 0] / width, extent[:, 1] / height], -1)


def _size(shape: tuple[int, int], like: Tensor) -> Tensor:
    """(width, height) as a tensor."""
    height, width = shape
    # filled on the device: a copy from the host would synchronise
    return torch.cat([like.new_full((1,), width), like.new_full((1,), height)])
