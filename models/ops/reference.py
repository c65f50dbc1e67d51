"""Multi-scale deformable attention in plain PyTorch: what every kernel must compute.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]

_BILINEAR, _ZEROS = 0, 0  # the enumerators of aten's grid sampler


def forward(value_BSMD: Tensor, shapes: Shapes, locations_BQMLP2: Tensor, weights_BQMLP: Tensor) -> Tensor:
    """sum over levels l and points p of A_mlqp * x_l(location), per head ("Deformable DETR", section 4.1, eq. 3).

    Args:
        value_BSMD: the values of all levels, level after level, row after row.
        shapes: (height, width) of every level; S is the sum of their products.
        locations_BQMLP2: x, y; 0 is the left (upper) edge of the first pixel, 1 the right (lower) edge of the last.
            Sampling is bilinear with zeros outside.
        weights_BQMLP: attention weights.

    Returns:
        [B, Q, M * D] in value's type.
    """
    out_XDQ = 0
    for level, value_XDHW in enumerate(_level_maps(value_BSMD, shapes)):
        grid_XQP2, weights_XQP = _level_queries(locations_BQMLP2, weights_BQMLP, level)
        sampled_XDQP = F.grid_sample(value_XDHW, grid_XQP2, "bilinear", "zeros", align_corners=False)
        out_XDQ = out_XDQ + (sampled_XDQP * weights_XQP[:, None]).sum(-1)
    batch, _, heads, channels = value_BSMD.shape
    return out_XDQ.view(batch, heads * channels, -1).transpose(1, 2).contiguous()


def backward(
    grad_BQC: Tensor, value_BSMD: Tensor, shapes: Shapes, locations_BQMLP2: Tensor, weights_BQMLP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for value, locations and weights, each shaped like its input.

    The samples are taken again instead of kept: at 800 x 1333 they are 360 MB a layer and image.
    """
    batch, _, heads, channels = value_BSMD.shape
    grad_XDQ1 = grad_BQC.transpose(1, 2).reshape(batch * heads, channels, -1, 1)
    grads_value, grads_location, grads_weight = [], [], []
    for level, value_XDHW in enumerate(_level_maps(value_BSMD, shapes)):
        grid_XQP2, weights_XQP = _level_queries(locations_BQMLP2, weights_BQMLP, level)
        sampled_XDQP = F.grid_sample(value_XDHW, grid_XQP2, "bilinear", "zeros", align_corners=False)
        grads_weight.append((sampled_XDQP * grad_XDQ1).sum(1))
        grad_value_XDHW, grad_grid_XQP2 = torch.ops.aten.grid_sampler_2d_backward(
            grad_XDQ1 * weights_XQP[:, None], value_XDHW, grid_XQP2, _BILINEAR, _ZEROS, False, [True, True]
        )
        grads_value.append(grad_value_XDHW.flatten(2))
        grads_location.append(2 * grad_grid_XQP2)  # grid = 2 * location - 1
    grad_value = torch.cat(grads_value, -1).view(batch, heads, channels, -1).permute(0, 3, 1, 2)
    grad_location = torch.stack(grads_location, 2).unflatten(0, (batch, heads)).transpose(1, 2)
    grad_weight = torch.stack(grads_weight, 2).unflatten(0, (batch, heads)).transpose(1, 2)
    return grad_value.contiguous(), grad_location.contiguous(), grad_weight.contiguous()


def _level_maps(value_BSMD: Tensor, shapes: Shapes) -> list[Tensor]:
    """The levels as images [B * M, D, H, W], batch and heads in one axis X."""
    batch, _, heads, channels = value_BSMD.shape
    value_XDS = value_BSMD.permute(0, 2, 3, 1).reshape(batch * heads, channels, -1)
    maps = value_XDS.split([h * w for h, w in shapes], dim=2)
    return [one.unflatten(2, shape) for one, shape in zip(maps, shapes, strict=True)]


def _level_queries(locations_BQMLP2: Tensor, weights_BQMLP: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """One level's sampling grid [X, Q, P, 2] in grid_sample's [-1, 1], and its weights [X, Q, P]."""
    grid = 2 * locations_BQMLP2[:, :, :, level] - 1
    return grid.transpose(1, 2).flatten(0, 1), weights_BQMLP[:, :, :, level].transpose(1, 2).flatten(0, 1)
