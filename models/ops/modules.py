"""The attention layer around the operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .functions import ms_deform_attn_fused
from .linear import TokenLinear


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention ("Deformable DETR", section 4.1).

    Args:
        d_model: C, the width of queries and tokens.
        n_levels: L feature levels.
        n_heads: M attention heads; divides d_model.
        n_points: P sampling points per head and level.
    """

    # of a layer that is to be exported it is another (models/export/sampling.py)
    operator: Callable[..., Tensor] = staticmethod(ms_deform_attn_fused)

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} must be a multiple of n_heads {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = TokenLinear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = TokenLinear(d_model, n_heads * n_levels * n_points)
        self.value_proj = TokenLinear(d_model, d_model)
        self.output_proj = TokenLinear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m samples in direction m of the unit square, point p at p pixels, with equal weights."""
        # at first offsets and weights do not depend on the query
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

        # the offsets of a fresh layer
        angle_M = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction_M2 = torch.stack([angle_M.cos(), angle_M.sin()], -1)
        # on the square, so that offsets are whole pixels for 8 heads
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
            reference_points: [B, Q, L, 2] x, y, or [B, Q, L, 4] with width and height, in [0, 1] of
                each padded level.
            input_flatten: [B, S, C] tokens of all levels.
            input_spatial_shapes: (height, width) per level; integers, or an [L, 2] tensor, which
                synchronises if it is on a GPU.
            input_level_start_index: not used; the published call has it.
            input_padding_mask: [B, S] bool, True on padding, whose values count as zero.

        Returns:
            [B, Q, C].

        Raises:
            ValueError: reference points of neither 2 nor 4 coordinates, or shapes that don't fit.
        """
        # padding counts as 0
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            # in place: nothing else reads it, not even the backward of the product
            value = value.masked_fill_(input_padding_mask[..., None], 0.0)

        # one value, one set of offsets and one set of logits per head
        value_BSMD = value.unflatten(-1, (self.n_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.n_heads, self.n_levels, self.n_points, 2))
        logits = self.attention_weights(query).unflatten(-1, (self.n_heads, self.n_levels, self.n_points))
        out = self.operator(value_BSMD, input_spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(out)
