"""The input and output of an encoder layer.

Shape letters: B images of all streams, S tokens of all levels, L levels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.ops.reference import Shapes
from util.step.transfer import to_device


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


def encoder_reference_points(spatial_shapes: Shapes, valid_ratios_BL2: Tensor) -> Tensor:
    """The centre of every token's pixel, as a point of every (padded) level: [B, S, L, 2]."""
    device = valid_ratios_BL2.device
    # in [0, 1] of the unpadded image, then of each padded level
    extents_BL2 = valid_ratios_BL2 * level_sizes(spatial_shapes, device)
    centres_BS2 = pixel_centres(spatial_shapes, device) / per_token(extents_BL2, spatial_shapes)
    return centres_BS2[:, :, None] * valid_ratios_BL2[:, None]


def pixel_centres(spatial_shapes: Shapes, device: torch.device) -> Tensor:
    """[S, 2]: x + 0.5, y + 0.5 of every pixel of every level, row after row."""
    centres = []
    for height, width in spatial_shapes:
        # made on the device; in exported graphs ranges begin with an integer
        y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
        centres.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1))
    return torch.cat([centre.flatten(0, 1) for centre in centres])


def per_token(levels_BLC: Tensor, spatial_shapes: Shapes) -> Tensor:
    """[B, L, C], one row a level -> [B, S, C], the row of its level for each token."""
    rows = zip(levels_BLC.unbind(1), spatial_shapes, strict=True)
    return torch.cat([row[:, None].expand(-1, height * width, -1) for row, (height, width) in rows], 1)


def level_sizes(spatial_shapes: Shapes, device: torch.device) -> Tensor:
    """[L, 2] float32: width and height of the padded levels, in pixels."""
    sizes = torch.tensor([[width, height] for height, width in spatial_shapes], dtype=torch.float32)
    return to_device(sizes, device)


def valid_extents(padding_mask_BS: Tensor, spatial_shapes: Shapes) -> Tensor:
    """[B, L, 2] float32: width and height of the unpadded part of each level, in pixels."""
    return level_sizes(spatial_shapes, padding_mask_BS.device) - _padding(padding_mask_BS, spatial_shapes)


def valid_ratios(padding_mask_BS: Tensor, spatial_shapes: Shapes) -> Tensor:
    """[B, L, 2] float32: width and height of the unpadded part of each level over the padded."""
    sizes_L2 = level_sizes(spatial_shapes, padding_mask_BS.device)
    return (sizes_L2 - _padding(padding_mask_BS, spatial_shapes)) / sizes_L2


def _padding(padding_mask_BS: Tensor, spatial_shapes: Shapes) -> Tensor:
    """[B, L, 2]: padded columns and rows of each level."""
    levels = padding_mask_BS.split([height * width for height, width in spatial_shapes], 1)
    masks = [mask.unflatten(1, shape) for mask, shape in zip(levels, spatial_shapes, strict=True)]
    # padding lies right and below: the first row and the first column tell
    padded = [padding.sum(1) for mask in masks for padding in (mask[:, 0], mask[:, :, 0])]
    return torch.stack(padded, -1).unflatten(1, (-1, 2))
