"""Multi-scale deformable attention in plain PyTorch: what every kernel must compute.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .deterministic import value_gradient

Shapes = Sequence[tuple[int, int]]

# bilinear interpolation and zeros outside, as aten's grid sampler numbers them; align_corners
_SAMPLING = (0, 0, False)


def forward(value_BSMD: Tensor, shapes: Shapes, locations_BQMLP2: Tensor, weights_BQMLP: Tensor) -> Tensor:
    """Per head the sum over levels l and points p of A_mlqp * x_l(location).

    "Deformable DETR", section 4.1, eq. 3.

    Args:
        value_BSMD: the values of all levels, level after level, row after row.
        shapes: (height, width) of every level; S is the sum of their products.
        locations_BQMLP2: x, y; 0 is the left (upper) edge of the first pixel, 1 the right (lower)
            edge of the last. Sampling is bilinear with zeros outside; a location that is not finite
            lies outside.
        weights_BQMLP: attention weights, of the locations' type, in which everything is computed.

    Returns:
        [B, Q, M * D] in value's type.
    """
    (batch, _, heads, channels), queries = value_BSMD.shape, locations_BQMLP2.shape[1]
    # in the locations' type, which is float32 for half precision
    out_XDQ = locations_BQMLP2.new_zeros(batch * heads, channels, queries)
    for level, value_XDHW in _level_maps(value_BSMD.to(locations_BQMLP2.dtype), shapes):
        grid_XQP2, weights_XQP = _level_queries(locations_BQMLP2, weights_BQMLP, level)
        sampled_XDQP = F.grid_sample(value_XDHW, grid_XQP2, "bilinear", "zeros", align_corners=False)
        out_XDQ = out_XDQ + (sampled_XDQP * weights_XQP[:, None]).sum(-1)
    return out_XDQ.view(batch, heads * channels, queries).transpose(1, 2).to(value_BSMD.dtype).contiguous()


def backward(
    grad_BQC: Tensor, value_BSMD: Tensor, shapes: Shapes, locations_BQMLP2: Tensor, weights_BQMLP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for value, locations and weights, each of the shape and type of its
    input.

    The samples are computed again instead of kept: at 800 x 1333 they are 360 MB a layer and image.
    Deterministic on the CPU, and on CUDA under `torch.use_deterministic_algorithms(True)`.
    """
    # the grid sampler of CUDA adds to the values in any order
    in_order = value_BSMD.is_cuda and torch.are_deterministic_algorithms_enabled()
    (batch, tokens, heads, channels), queries = value_BSMD.shape, grad_BQC.shape[1]
    dtype = locations_BQMLP2.dtype
    grad_XDQ1 = grad_BQC.to(dtype).transpose(1, 2).reshape(batch * heads, channels, queries, 1)
    grad_value_XDS = locations_BQMLP2.new_zeros(batch * heads, channels, tokens)
    grad_locations = torch.zeros_like(locations_BQMLP2)
    grad_weights = torch.zeros_like(weights_BQMLP)

    def per_query(x_XQP: Tensor) -> Tensor:
        return x_XQP.unflatten(0, (batch, heads)).transpose(1, 2)

    starts = _starts(shapes)
    for level, value_XDHW in _level_maps(value_BSMD.to(locations_BQMLP2.dtype), shapes):
        grid_XQP2, weights_XQP = _level_queries(locations_BQMLP2, weights_BQMLP, level)
        sampled_XDQP = F.grid_sample(value_XDHW, grid_XQP2, "bilinear", "zeros", align_corners=False)
        grad_weights[:, :, :, level] = per_query((sampled_XDQP * grad_XDQ1).sum(1))

        # the gradients of values and grid
        grad_sampled = grad_XDQ1 * weights_XQP[:, None]
        wanted = [not in_order, True]
        with _no_alarm() if in_order else contextlib.nullcontext():
            grad_value_XDHW, grad_grid_XQP2 = torch.ops.aten.grid_sampler_2d_backward(
                grad_sampled, value_XDHW, grid_XQP2, *_SAMPLING, wanted
            )
        if not in_order:
            grad_value_XDS[:, :, starts[level] : starts[level + 1]] = grad_value_XDHW.flatten(2)
        # grid = 2 * location - 1
        grad_locations[:, :, :, level] = 2 * per_query(grad_grid_XQP2)

    if in_order:
        grad_value = value_gradient(grad_BQC, value_BSMD, shapes, locations_BQMLP2, weights_BQMLP)
    else:
        grad_value = grad_value_XDS.view(batch, heads, channels, tokens).permute(0, 3, 1, 2)
    return grad_value.to(value_BSMD.dtype).contiguous(), grad_locations, grad_weights


def fused_forward(
    value_BSMD: Tensor, shapes: Shapes, reference: Tensor, offsets_BQMLP2: Tensor, logits_BQMLP: Tensor
) -> Tensor:
    """`forward` of locations around reference points or boxes, and of weights by softmax.

    Args:
        value_BSMD, shapes: as for `forward`.
        reference: [B, Q, L, 2] points x, y or [B, Q, L, 4] boxes x, y, width, height, in [0, 1] of
            a level.
        offsets_BQMLP2: in pixels of the level around points, in half boxes / P around boxes
            ("Deformable DETR", section 4.1 and appendix A.4).
        logits_BQMLP: the softmax over all levels and points gives the weights.
    """
    locations = locate(shapes, reference, offsets_BQMLP2)
    return forward(value_BSMD, shapes, locations, _softmax(logits_BQMLP, reference.dtype))


def fused_backward(
    grad_BQC: Tensor,
    value_BSMD: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets_BQMLP2: Tensor,
    logits_BQMLP: Tensor,
    needs_reference: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fused_forward` for value, reference, offsets and logits.

    All but the first are in the reference's type. Without `needs_reference` the second is empty.
    """
    weights = _softmax(logits_BQMLP, reference.dtype)
    locations = locate(shapes, reference, offsets_BQMLP2)
    grad_value, grad_locations, grad_weights = backward(grad_BQC, value_BSMD, shapes, locations, weights)

    # through the softmax
    weighted = weights * grad_weights
    grad_logits = weighted - weights * weighted.sum((-1, -2), keepdim=True)

    # through `locate`: around points, then around boxes
    if reference.shape[-1] == 2:
        sizes_L12 = _sizes(shapes, reference)[:, None]
        # an empty level has no samples
        grad_offsets = torch.where(sizes_L12 > 0, grad_locations / sizes_L12, 0)
    else:
        shares = grad_locations * 0.5 / offsets_BQMLP2.shape[4]
        grad_offsets = shares * reference[:, :, None, :, None, 2:]
    if not needs_reference:
        return grad_value, reference.new_empty(0), grad_offsets, grad_logits
    grad_reference = grad_locations.sum((2, 4))
    if reference.shape[-1] == 4:
        grad_reference = torch.cat([grad_reference, (shares * offsets_BQMLP2).sum((2, 4))], -1)
    return grad_value, grad_reference, grad_offsets, grad_logits


def locate(shapes: Shapes, reference: Tensor, offsets_BQMLP2: Tensor) -> Tensor:
    """Sampling locations [B, Q, M, L, P, 2] around points [B, Q, L, 2] or boxes [B, Q, L, 4]."""
    around = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        return around + offsets_BQMLP2 / _sizes(shapes, reference)[:, None]
    return around[..., :2] + offsets_BQMLP2 / offsets_BQMLP2.shape[4] * around[..., 2:] * 0.5


@contextlib.contextmanager
def _no_alarm() -> Iterator[None]:
    """A block in which deterministic mode is off.

    In that mode PyTorch refuses the gradient of the grid sampler on CUDA, though that of the grid
    alone is deterministic.
    """
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=only_warns)


def _softmax(logits_BQMLP: Tensor, dtype: torch.dtype) -> Tensor:
    return logits_BQMLP.flatten(-2).softmax(-1, dtype=dtype).view_as(logits_BQMLP)


def _sizes(shapes: Shapes, like: Tensor) -> Tensor:
    """[L, 2] width, height of the levels, on the device and in the type of `like`."""
    return _sizes_on(tuple((height, width) for height, width in shapes), like.device, like.dtype)


@cache  # for good: a recorded CUDA graph goes on reading it
def _sizes_on(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # later calls may differentiate
        sizes = torch.tensor([[w, h] for h, w in shapes], dtype=dtype).view(-1, 2)
        if device.type == "cuda":  # a copy from pinned memory does not synchronise
            return sizes.pin_memory().to(device, non_blocking=True)
        return sizes.to(device)


def _starts(shapes: Shapes) -> list[int]:
    """The first token of every level, and S."""
    starts = [0]
    for height, width in shapes:
        starts.append(starts[-1] + height * width)
    return starts


def _level_maps(value_BSMD: Tensor, shapes: Shapes) -> list[tuple[int, Tensor]]:
    """Number and map [X, D, H, W] of every level that has pixels; X is batch and heads."""
    batch, tokens, heads, channels = value_BSMD.shape
    value_XDS = value_BSMD.permute(0, 2, 3, 1).reshape(batch * heads, channels, tokens)
    maps = value_XDS.split([height * width for height, width in shapes], dim=2)
    found = []
    for level, (height, width) in enumerate(shapes):
        if height * width:
            found.append((level, maps[level].unflatten(2, (height, width))))
    return found


def _level_queries(locations_BQMLP2: Tensor, weights_BQMLP: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """One level's sampling grid [X, Q, P, 2] in grid_sample's [-1, 1], and its weights [X, Q, P]."""
    # devices differ in what grid_sample gives far outside; 3 is outside on all
    grid = (2 * locations_BQMLP2[:, :, :, level] - 1).nan_to_num(nan=3.0).clamp(-3, 3)
    weights = weights_BQMLP[:, :, :, level]
    return grid.transpose(1, 2).flatten(0, 1), weights.transpose(1, 2).flatten(0, 1)
