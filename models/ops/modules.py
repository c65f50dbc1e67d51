"""The attention layer around the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from models.ops.functions import flat_shapes, ms_deform_attn, shape_pairs


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention ("Deformable DETR", section 4.1).

    Args:
        d_model: C, the width of queries and tokens.
        n_levels: L feature levels.
        n_heads: M attention heads; divides d_model.
        n_points: P sampling points per head and level.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} must be a multiple of n_heads {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m looks along direction m of the unit square, point p at p pixels; all points weigh the same."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle_M = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction_M2 = torch.stack([angle_M.cos(), angle_M.sin()], -1)
        direction_M2 = direction_M2 / direction_M2.abs().max(-1, keepdim=True).values
        distance_P = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction_M2[:, None, None] * distance_P[None, None, :, None]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from `query` to the tokens around its reference points.

        Args:
            query: [B, Q, C].
            reference_points: [B, Q, L, 2] x, y, or [B, Q, L, 4] with width and height, in [0, 1] of each padded level.
            input_flatten: [B, S, C] tokens of all levels.
            input_spatial_shapes: (height, width) per level; integers, or an [L, 2] tensor, which a GPU must be waited for.
            input_level_start_index: not needed; kept so that the published call fits.
            input_padding_mask: [B, S] bool, True on padding, whose values count as zero.

        Returns:
            [B, Q, C].

        Raises:
            ValueError: reference points of neither 2 nor 4 coordinates, or shapes that don't fit.
        """
        shapes = shape_pairs(flat_shapes(input_spatial_shapes))
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value_BSMD = value.unflatten(-1, (self.n_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.n_heads, self.n_levels, self.n_points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.n_heads, self.n_levels * self.n_points)).softmax(-1)
        weights_BQMLP = weights.unflatten(-1, (self.n_levels, self.n_points))
        locations = self._locations(reference_points[:, :, None, :, None], offsets, shapes)
        return self.output_proj(ms_deform_attn(value_BSMD, shapes, locations, weights_BQMLP))

    def _locations(self, reference: Tensor, offsets: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """reference [B, Q, 1, L, 1, 2 or 4] and offsets [B, Q, M, L, P, 2] -> locations [B, Q, M, L, P, 2]."""
        if reference.shape[-1] == 2:  # offsets are in pixels of their level
            # the compiler makes constants of its own and can't look into the cache
            sizes = _level_sizes if torch.compiler.is_compiling() else _cached_level_sizes
            return reference + offsets / sizes(tuple(shapes), offsets.device, offsets.dtype)
        if reference.shape[-1] == 4:  # offsets are in half boxes, divided among the points
            return reference[..., :2] + offsets * reference[..., 2:] * (0.5 / self.n_points)
        raise ValueError(f"reference_points must have 2 or 4 coordinates, got {reference.shape[-1]}")


def _level_sizes(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[L, 1, 2] width, height of the levels; every layer of a batch asks for the same one."""
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=dtype)[:, None]
    # through pinned memory nobody waits for the device
    return sizes.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sizes.to(device)


_cached_level_sizes = lru_cache(maxsize=256)(_level_sizes)
