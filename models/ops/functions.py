"""The operator `deformable::ms_deform_attn`: schema, checks, fake, gradient; and the ways to call it.

It exists without any build: the implementation for every device is models/ops/reference.py until a compiled kernel
registers one of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from models.ops import reference

log = logging.getLogger(__name__)


def ms_deform_attn(value: Tensor, spatial_shapes: Sequence, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention ("Deformable DETR", eq. 3), without its linear layers.

    Args:
        value: [B, S, M, D] floating point; the tokens of all levels, in M heads of D channels.
        spatial_shapes: (height, width) of the L levels as integers, with S = sum of height * width.
        locations: [B, Q, M, L, P, 2] sampling locations x, y in [0, 1] of the (padded) level; outside counts as zero.
        weights: [B, Q, M, L, P] attention weights.

    Returns:
        [B, Q, M * D].

    Raises:
        ValueError: a shape, type or device does not fit; the message names the argument.
    """
    if not torch.compiler.is_compiling():
        _log_backend(value.device.type)
    return torch.ops.deformable.ms_deform_attn(value, flat_shapes(spatial_shapes), locations, weights)


def flat_shapes(spatial_shapes: Sequence | Tensor) -> list[int]:
    """[(h, w), ...] or an [L, 2] tensor -> [h, w, h, w, ...]. A tensor on a GPU makes the host wait for it."""
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [size for row in rows for size in row]


class MSDeformAttnFunction:
    """The published call, for code that was written for it: `MSDeformAttnFunction.apply(...)`."""

    @staticmethod
    def apply(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step):
        """As `ms_deform_attn`; the start indices follow from the shapes and any batch fits any step."""
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    """The published name of the plain PyTorch path: reference.forward, differentiated by autograd."""
    shapes = shape_pairs(flat_shapes(value_spatial_shapes))
    return reference.forward(value, shapes, sampling_locations, attention_weights)


_SCHEMAS = {
    "ms_deform_attn": "(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor",
    "ms_deform_attn_backward": "(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) "
    "-> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"deformable::{_name}", _schema)


@torch.library.impl("deformable::ms_deform_attn", "default")
def _forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    _check(value, shapes, locations, weights)
    return reference.forward(value, shape_pairs(shapes), locations.to(value.dtype), weights.to(value.dtype))


@torch.library.impl("deformable::ms_deform_attn_backward", "default")
def _backward(grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor):
    typed = (locations.to(value.dtype), weights.to(value.dtype))
    grad_value, grad_locations, grad_weights = reference.backward(grad, value, shape_pairs(shapes), *typed)
    return grad_value, grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


@torch.library.register_fake("deformable::ms_deform_attn")
def _fake_forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    _check(value, shapes, locations, weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


@torch.library.register_fake("deformable::ms_deform_attn_backward")
def _fake_backward(grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, locations, weights))


def _save_inputs(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradient(ctx, grad: Tensor):
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.deformable.ms_deform_attn_backward(
        grad, value, ctx.shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


torch.library.register_autograd("deformable::ms_deform_attn", _gradient, setup_context=_save_inputs)


def _check(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> None:
    _require(value.dim() == 4 and value.is_floating_point(), "value", value, "[B, S, M, D] floating point")
    batch, tokens, heads, _ = value.shape
    levels = len(shapes) // 2
    total = sum(h * w for h, w in shape_pairs(shapes))
    if total != tokens:
        raise ValueError(f"spatial_shapes {shape_pairs(shapes)} hold {total} tokens, value has {tokens}")
    wanted = f"[B={batch}, Q, M={heads}, L={levels}, P, 2]"
    fits = locations.dim() == 6 and locations.shape[-1] == 2
    fits = fits and (locations.shape[0], locations.shape[2], locations.shape[3]) == (batch, heads, levels)
    _require(fits and locations.is_floating_point(), "locations", locations, f"{wanted} floating point")
    _require(
        weights.shape == locations.shape[:-1] and weights.is_floating_point(),
        "weights", weights, f"{list(locations.shape[:-1])} floating point, as locations say",
    )  # fmt: skip
    for name, tensor in (("locations", locations), ("weights", weights)):
        _require(tensor.device == value.device, name, tensor, f"on {value.device}, as value is")


def _require(condition: bool, name: str, tensor: Tensor, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}; got {list(tensor.shape)} {tensor.dtype} on {tensor.device}")


def shape_pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    """[h, w, h, w, ...] -> [(h, w), ...], the inverse of `flat_shapes`."""
    return list(zip(shapes[0::2], shapes[1::2], strict=True))


@cache
def _log_backend(device: str) -> None:
    log.info("multi-scale deformable attention on %s: reference (plain PyTorch); no compiled kernel is built", device)
