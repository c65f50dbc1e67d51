"""Multi-scale deformable attention by gathers and arithmetic, for exported graphs alone.

Runtimes differ in their operator for sampling a grid, and some compute it wrongly; rows of a table they
all read alike. `models.ops.reference` says what is computed.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.reference import Shapes


def attend_by_gathers(
    value_BSMD: Tensor, shapes: Shapes, reference: Tensor, offsets_BQMLP2: Tensor, logits_BQMLP: Tensor
) -> Tensor:
    """models.ops.functions.ms_deform_attn_fused, with arguments as there: [B, Q, M * D] in value's type.

    Locations, weights and sums are float32 whatever the types of values, offsets and logits. The sizes
    of `shapes` may be symbols of a trace.
    """
    sizes_L2 = torch.stack([torch.stack([_scalar(w, reference), _scalar(h, reference)]) for h, w in shapes])
    weights = logits_BQMLP.float().flatten(-2).softmax(-1).view_as(logits_BQMLP)
    return _sample(
        value_BSMD, shapes, sizes_L2, locations(sizes_L2, reference, offsets_BQMLP2.float()), weights
    )


def locations(sizes_L2: Tensor, reference: Tensor, offsets_BQMLP2: Tensor) -> Tensor:
    """Sampling locations [B, Q, M, L, P, 2] in [0, 1] of the levels, from their widths and heights."""
    around = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        return around + offsets_BQMLP2 / sizes_L2[:, None]
    return around[..., :2] + offsets_BQMLP2 / offsets_BQMLP2.shape[4] * around[..., 2:] * 0.5


def _sample(
    value_BSMD: Tensor, shapes: Shapes, sizes_L2: Tensor, locations_BQMLP2: Tensor, weights_BQMLP: Tensor
) -> Tensor:
    """models.ops.reference.forward."""
    (batch, _, heads, channels), device = value_BSMD.shape, value_BSMD.device
    # all images and heads are one table
    table = value_BSMD.float().reshape(-1, channels)
    image_B = torch.arange(batch, device=device) * value_BSMD.shape[1]
    head_M1 = torch.arange(heads, device=device)[:, None]

    # a level at a time, because what is gathered is the largest tensor of all
    start, out = 0, None
    for level, (height, width) in enumerate(shapes):
        pixels = locations_BQMLP2[:, :, :, level] * sizes_L2[level] - 0.5
        # beyond the level, and where there is no number, the pixels around have no weight
        inside = (pixels > -1) & (pixels < sizes_L2[level])
        pixels = torch.where(inside, pixels, -1.0)
        first = pixels.floor()
        beyond = pixels - first
        columns, column_shares = _neighbours(first[..., 0], beyond[..., 0], width)
        rows, row_shares = _neighbours(first[..., 1], beyond[..., 1], height)

        # the four pixels around a location, all points of a query side by side
        tokens_BQMP4 = torch.stack([y * width + x for y in rows for x in columns], -1)
        shares_BQMP4 = torch.stack([y * x for y in row_shares for x in column_shares], -1)
        shares_BQMK = (shares_BQMP4 * weights_BQMLP[:, :, :, level, :, None]).flatten(-2)
        tokens_BQMK = tokens_BQMP4.flatten(-2) + start + image_B[:, None, None, None]
        sampled_BQMKD = F.embedding(tokens_BQMK * heads + head_M1, table)
        summed = (shares_BQMK[..., None, :] @ sampled_BQMKD).flatten(2)
        out = summed if out is None else out + summed
        start = start + height * width
    assert out is not None
    return out.to(value_BSMD.dtype)


def _neighbours(first: Tensor, beyond: Tensor, side: int) -> tuple[list[Tensor], list[Tensor]]:
    """Along an axis: the two pixels around a location, and their shares; those outside have none."""
    index = first.to(torch.int64)
    shares = [(1 - beyond) * (first >= 0), beyond * (first < side - 1)]
    return [index.clamp(min=0), (index + 1).clamp(max=side - 1)], shares


def _scalar(size: int, like: Tensor) -> Tensor:
    return torch.scalar_tensor(size, dtype=torch.float32, device=like.device)
