"""Position encodings of feature maps. Shape letters: B images, C channels, H x W positions."""

from __future__ import annotations

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

    def __init__(
        self, num_pos_feats: int, temperature: float = 10000.0, scale: float = 6.283185307179586
    ) -> None:
        super().__init__()
        self.num_pos_feats, self.temperature, self.scale = num_pos_feats, temperature, scale

    def forward(self, mask_BHW: Tensor) -> Tensor:
        """Padding mask (True on padding) -> [B, C, H, W] float32, y's features first."""
        valid = ~mask_BHW
        # integer sums do not depend on the order of additions, which varies on CUDA
        features = [self._features(valid.cumsum(axis, dtype=torch.int32).float(), axis) for axis in (1, 2)]
        return torch.cat(features, -1).permute(0, 3, 1, 2)

    def _features(self, count_BHW: Tensor, axis: int) -> Tensor:
        # the last count is the number of pixels that are not padding
        size = count_BHW.narrow(axis, count_BHW.shape[axis] - 1, 1)
        position = (count_BHW - 0.5) / (size + 1e-6) * self.scale
        return sine_features(position, self.num_pos_feats, self.temperature)


class PositionEmbeddingLearned(nn.Module):
    """Learned rows and columns of up to `positions` each."""

    def __init__(self, num_pos_feats: int, positions: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(positions, num_pos_feats)
        self.col_embed = nn.Embedding(positions, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask_BHW: Tensor) -> Tensor:
        """Padding mask -> [B, C, H, W], x's features first.

        Raises UserError for a map larger than the tables.
        """
        batch, height, width = mask_BHW.shape
        known = self.row_embed.num_embeddings
        if max(height, width) > known:
            raise UserError(
                f"--position_embedding learned knows {known} x {known} positions and a feature map "
                f"has {height} x {width}; "
                "use --position_embedding sine or smaller images (--eval_size, --train_sizes, "
                "--max_size)"
            )
        # the same for all images: padding does not shift them
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], -1).permute(2, 0, 1).expand(batch, -1, -1, -1)


def sine_features(position: Tensor, num_features: int, temperature: float = 10000.0) -> Tensor:
    """[...] -> [..., num_features]: sin on even and cos on odd features.

    The wavelengths grow from 2 pi to 2 pi * temperature.
    """
    # two features of one wavelength each
    index = torch.arange(num_features, dtype=torch.float32, device=position.device)
    angle = position[..., None] / temperature ** (2 * (index // 2) / num_features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)
