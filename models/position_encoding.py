"""Position encodings of the feature maps of all levels.

Shape letters: B images, C channels, H x W positions of a level, S positions of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util.errors import UserError


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the normalised position in two dimensions.

    "Attention is all you need", section 3.5, for each axis.

    Args:
        num_pos_feats: features per axis, C / 2.
        temperature: base of the wavelengths.
        scale: what positions in [0, 1] are multiplied by.
    """

    wavelengths: Tensor

    def __init__(
        self, num_pos_feats: int, temperature: float = 10000.0, scale: float = 6.283185307179586
    ) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("wavelengths", wavelengths(num_pos_feats, temperature), persistent=False)

    def forward(self, masks: Sequence[Tensor]) -> Tensor:
        """Padding masks [B, H, W] (True on padding) -> [B, S, C] float32, y's features first."""
        levels = [_count(~mask) for mask in masks]
        # all levels at once: a step has few calls that are as small as these
        count_BS2, size_BS2 = (torch.cat(tensors, 1) for tensors in zip(*levels, strict=True))
        position_BS2 = (count_BS2 - 0.5) / (size_BS2 + 1e-6) * self.scale
        return sine_features(position_BS2, self.wavelengths).flatten(2)


class PositionEmbeddingLearned(nn.Module):
    """Learned rows and columns of up to `positions` each."""

    def __init__(self, num_pos_feats: int, positions: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(positions, num_pos_feats)
        self.col_embed = nn.Embedding(positions, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, masks: Sequence[Tensor]) -> Tensor:
        """Padding masks [B, H, W] -> [B, S, C], x's features first.

        Raises UserError for a map larger than the tables.
        """
        levels = [self._level(*mask.shape[1:]) for mask in masks]
        # the same for all images: padding does not shift them
        return torch.cat(levels).expand(masks[0].shape[0], -1, -1)

    def _level(self, height: int, width: int) -> Tensor:
        """[H * W, C]."""
        known = self.row_embed.num_embeddings
        if max(height, width) > known:
            raise UserError(
                f"--position_embedding learned knows {known} x {known} positions and a feature map "
                f"has {height} x {width}; "
                "use --position_embedding sine or smaller images (--eval_size, --train_sizes, "
                "--max_size)"
            )
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], -1).flatten(0, 1)


def _count(valid_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position its y, x among those that are not padding, and the number of these: [B, HW, 2]."""
    # integer sums do not depend on the order of additions, which varies on CUDA
    y, x = (valid_BHW.cumsum(axis, dtype=torch.int32) for axis in (1, 2))
    # the last count is the number
    height, width = y[:, -1:].expand_as(y), x[:, :, -1:].expand_as(x)
    return torch.stack([y, x], -1).flatten(1, 2), torch.stack([height, width], -1).flatten(1, 2)


def wavelengths(num_features: int, temperature: float = 10000.0) -> Tensor:
    """[num_features / 2]: they grow from 1 to `temperature`, in units of 2 pi."""
    # a sine and a cosine of each
    index = torch.arange(num_features // 2, dtype=torch.float32)
    return temperature ** (2 * index / num_features)


def sine_features(position: Tensor, wavelengths_W: Tensor) -> Tensor:
    """[...] -> [..., 2 W]: sin on even and cos on odd features."""
    angle = position[..., None] / wavelengths_W
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
