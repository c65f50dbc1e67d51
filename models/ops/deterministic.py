"""The gradient of the values without atomics: bit for bit the same in every run.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points. A is the type to accumulate in: float64 for float64 values, else float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def value_gradient(
    grad_BQC: Tensor,
    value_BSMD: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations_BQMLP2: Tensor,
    weights_BQMLP: Tensor,
) -> Tensor:
    """The gradient of reference.forward for the values, summed in one fixed order.

    `index_put_(accumulate=True)` sorts by address on CUDA and sums duplicates one after the other,
    in any mode; on the CPU it does so under `torch.use_deterministic_algorithms(True)`. One call
    per level, point and corner bounds the memory to a few copies of `grad_BQC` in A. There is no
    synchronisation with the device.

    Args:
        grad_BQC: [B, Q, M * D], the gradient of the output.
        value_BSMD: the values; only their shape and type are used.
        shapes: (height, width) of the levels.
        locations_BQMLP2: x, y in [0, 1] of their level, in A. A sample outside, infinite or NaN
            gives nothing.
        weights_BQMLP: attention weights, in A.

    Returns:
        [B, S, M, D] in value's type.
    """
    batch, tokens, heads, channels = value_BSMD.shape
    owners_XD = weights_BQMLP.new_zeros(batch * tokens * heads, channels)
    grad_BQMD = grad_BQC.unflatten(-1, (heads, channels)).to(weights_BQMLP.dtype)
    image_B11 = torch.arange(batch, device=grad_BQC.device)[:, None, None] * tokens
    head_M = torch.arange(heads, device=grad_BQC.device)
    start = 0
    for level, (height, width) in enumerate(shapes):
        for point in range(weights_BQMLP.shape[-1] if height * width else 0):
            location_BQM2 = locations_BQMLP2[:, :, :, level, point]
            weight_BQM = weights_BQMLP[:, :, :, level, point]
            for pixel_BQM, part_BQM, valid_BQM in _corners(location_BQM2, height, width):
                # the row of this image, pixel and head
                owner_BQM = (image_B11 + start + pixel_BQM) * heads + head_M
                # not a product with 0: weights and gradients may be infinite
                share_BQMD = torch.where(
                    valid_BQM[..., None], (part_BQM * weight_BQM)[..., None] * grad_BQMD, 0
                )
                owners_XD.index_put_((owner_BQM,), share_BQMD, accumulate=True)
        start += height * width
    return owners_XD.view(value_BSMD.shape).to(value_BSMD.dtype)


def _corners(location_BQM2: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For the four corners of the samples: pixel y * width + x, bilinear weight, and whether it exists.

    A corner outside of the map has the index of the nearest pixel. One index for all would be slow,
    because sums into one pixel are serial.
    """
    x, y = location_BQM2[..., 0] * width - 0.5, location_BQM2[..., 1] * height - 0.5
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    # infinity and NaN do not convert to integers
    x, y = x.nan_to_num(-1.0).clamp(-1, width), y.nan_to_num(-1.0).clamp(-1, height)
    left, top = x.floor(), y.floor()
    for column, part_x in ((left, left + 1 - x), (left + 1, x - left)):
        for row, part_y in ((top, top + 1 - y), (top + 1, y - top)):
            valid = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            pixel = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            yield pixel, part_x * part_y, valid
