"""Multi-scale deformable attention by gathers and arithmetic, for exported graphs alone.

Runtimes differ in their operator for sampling a grid, and some compute it wrongly; rows of a table they
all read alike. `models.ops.reference` says what is computed.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.reference import Shapes
from util.step.precision import full_precision


def attend_by_gathers(
    value_BSMD: Tensor, shapes: Shapes, reference: Tensor, offsets_BQMLP2: Tensor, logits_BQMLP: Tensor
) -> Tensor:
    """models.ops.functions.ms_deform_attn_fused, with arguments as there: [B, Q, M * D] in value's type.

    Locations, weights and sums are float32 whatever the types of values, offsets and logits. The sizes
    of `shapes` may be symbols of a trace.
    """
    sides = [torch.scalar_tensor(side, dtype=torch.int64) for shape in shapes for side in reversed(shape)]
    sizes_L2 = torch.stack(sides).view(-1, 2).to(reference.device)
    weights = logits_BQMLP.float().flatten(-2).softmax(-1).view_as(logits_BQMLP)
    locations = locate(sizes_L2, reference, offsets_BQMLP2.float())
    rows_BQMLK, shares_BQMLK = _neighbours(value_BSMD, sizes_L2, locations)
    shares_BQMLK = shares_BQMLK * weights.repeat(1, 1, 1, 1, 4)

    # all images and heads are one table; a level at a time, because what is gathered is the largest tensor
    table = value_BSMD.float().flatten(0, 2)
    levels = zip(rows_BQMLK.unbind(3), shares_BQMLK.unbind(3), strict=True)
    with full_precision(table.device):
        sums = [shares[..., None, :] @ F.embedding(rows, table) for rows, shares in levels]
    return functools.reduce(torch.add, sums).flatten(2).to(value_BSMD.dtype)


def locate(sizes_L2: Tensor, reference: Tensor, offsets_BQMLP2: Tensor) -> Tensor:
    """Sampling locations [B, Q, M, L, P, 2] in [0, 1] of the levels, from their widths and heights."""
    around = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        return around + offsets_BQMLP2 / sizes_L2[:, None]
    return around[..., :2] + offsets_BQMLP2 / offsets_BQMLP2.shape[4] * around[..., 2:] * 0.5


def _neighbours(value_BSMD: Tensor, sizes_L2: Tensor, locations_BQMLP2: Tensor) -> tuple[Tensor, Tensor]:
    """The four pixels around each location, one after the other for all points: K = 4 P.

    No tensor has more than six dimensions: OpenVINO 2026.4 compares integers wrongly from seven on.

    Returns:
        rows [B, Q, M, L, K] of the table [B * S * M, D], and their shares in a bilinear sample. A pixel
        outside of the level has none.
    """
    pixels = locations_BQMLP2 * sizes_L2[:, None] - 0.5
    # farther away, and where there is no number, nothing has a share
    inside = (pixels > -1) & (pixels < sizes_L2[:, None])
    pixels = torch.where(inside, pixels, -1.0)
    first = pixels.floor()
    beyond = pixels - first

    # along both axes the pixel before the location and the one behind it
    last = sizes_L2[:, None] - 1
    sides = []
    for place, share in ((first, 1 - beyond), (first + 1, beyond)):
        place = place.to(torch.int64)
        within = (place >= 0) & (place <= last)
        x, y = place.clamp(min=0).minimum(last).unbind(-1)
        share_x, share_y = torch.where(within, share, 0.0).unbind(-1)
        sides.append((x, y * sizes_L2[:, :1], share_x, share_y))
    pairs = list(itertools.product(sides, sides))
    tokens = torch.cat([row + x for (x, _, _, _), (_, row, _, _) in pairs], -1)
    shares_BQMLK = torch.cat([share_x * share_y for (_, _, share_x, _), (_, _, _, share_y) in pairs], -1)

    # where in the table: levels, images and heads
    areas_L = sizes_L2.prod(1)
    starts_L1 = (areas_L.cumsum(0) - areas_L)[:, None]
    batch, all_tokens, heads, _ = value_BSMD.shape
    image_B1111 = torch.arange(batch, device=sizes_L2.device)[:, None, None, None, None] * all_tokens
    head_M11 = torch.arange(heads, device=sizes_L2.device)[:, None, None]
    return (tokens + starts_L1 + image_B1111) * heads + head_M11, shares_BQMLK
