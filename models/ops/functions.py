"""Multi-scale deformable attention as operators of PyTorch: schemas, checks, types, gradients.

`deformable::ms_deform_attn` takes sampling locations and attention weights,
`deformable::ms_deform_attn_fused` takes what these are computed from. Both exist without a build;
models/ops/backends.py chooses the implementation.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import backends, reference

_VALUE_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence | Tensor,
    locations: Tensor,
    weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention ("Deformable DETR", eq. 3), without its linear layers.

    Differentiable once in value, locations and weights. Under autocast the values are cast, the
    locations stay as they are.

    Args:
        value: [B, S, M, D] float32, float64, float16 or bfloat16; the tokens of all levels, in M
            heads of D channels.
        spatial_shapes: (height, width) of the L levels as integers, with S = sum of height * width.
            A tensor on a GPU is copied to the host, which synchronises.
        locations: [B, Q, M, L, P, 2] floating point; x, y in [0, 1] of the (padded) level; outside,
            or not finite, counts as zero. float32 is best: a step of bfloat16 near 1 is 0.65 pixels
            on a level 167 wide.
        weights: [B, Q, M, L, P] floating point attention weights.
        backend: "auto", "compiled", "triton" or "reference".

    Returns:
        [B, Q, M * D] in value's type; summed in float32 (float64 for float64).

    Raises:
        ValueError: a shape, type or device does not fit; the message names the argument.
        RuntimeError: the backend is not available, or failed its comparison with the reference.
    """
    return torch.ops.deformable.ms_deform_attn(
        value, flat_shapes(spatial_shapes), locations, weights, backend
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence | Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    backend: str = "auto",
) -> Tensor:
    """`ms_deform_attn` from reference points, offsets and logits ("Deformable DETR", section 4.1).

    The locations and weights computed from these are not written to memory.

    Args:
        value, spatial_shapes, backend: as for `ms_deform_attn`.
        reference_points: [B, Q, L, 2] x, y or [B, Q, L, 4] x, y, width, height, in [0, 1] of each
            (padded) level.
        offsets: [B, Q, M, L, P, 2] in pixels of the level around points, in half boxes / P around
            boxes.
        logits: [B, Q, M, L, P]; their softmax over all levels and points gives the attention
            weights.

    Returns, raises: as `ms_deform_attn`. Differentiable once in all four tensors.
    """
    return torch.ops.deformable.ms_deform_attn_fused(
        value, flat_shapes(spatial_shapes), reference_points, offsets, logits, backend
    )


def flat_shapes(spatial_shapes: Sequence | Tensor) -> list[int]:
    """[(h, w), ...] or an [L, 2] tensor -> [h, w, h, w, ...]."""
    # a tensor on a GPU synchronises here
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    return [size for row in spatial_shapes for size in row]


def shape_pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    """[h, w, h, w, ...] -> [(h, w), ...], the inverse of `flat_shapes`."""
    return list(zip(shapes[0::2], shapes[1::2], strict=True))


class MSDeformAttnFunction:
    """The published call, for code that was written for it: `MSDeformAttnFunction.apply(...)`."""

    @staticmethod
    def apply(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        """As `ms_deform_attn`. The start indices and the step are not needed."""
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_core_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    """The published name of the plain PyTorch path: reference.forward, differentiated by autograd."""
    # without the checks of the operator
    shapes = shape_pairs(flat_shapes(value_spatial_shapes))
    return reference.forward(value, shapes, sampling_locations, attention_weights)


# ---- checks and types


def _check_ready(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> None:
    _check_value(value, shapes)
    _check_samples(value, shapes, locations, weights, ("locations", "weights"))


def _check_fused(
    value: Tensor, shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> None:
    _check_value(value, shapes)
    _check_samples(value, shapes, offsets, logits, ("offsets", "logits"))

    # points or boxes, one for each query and level
    batch, queries, levels = offsets.shape[0], offsets.shape[1], offsets.shape[3]
    fits = reference_points.dim() == 4 and reference_points.shape[:3] == (batch, queries, levels)
    fits = fits and reference_points.shape[3] in (2, 4) and reference_points.is_floating_point()
    wanted = f"[B={batch}, Q={queries}, L={levels}, 2 or 4] floating point"
    _require(fits, "reference_points", reference_points, wanted)
    _require_device(value, "reference_points", reference_points)


def _check_value(value: Tensor, shapes: list[int]) -> None:
    fits = value.dim() == 4 and value.dtype in _VALUE_TYPES
    _require(fits, "value", value, "[B, S, M, D] of float32, float64, float16 or bfloat16")
    # a kernel would read beyond the tokens
    if any(size < 0 for size in shapes):
        raise ValueError(f"spatial_shapes {shape_pairs(shapes)} must not be negative")
    # the levels make up the tokens
    total = sum(h * w for h, w in shape_pairs(shapes))
    if total != value.shape[1]:
        raise ValueError(
            f"spatial_shapes {shape_pairs(shapes)} hold {total} tokens, value has {value.shape[1]}"
        )


def _check_samples(
    value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, names: tuple[str, str]
) -> None:
    """Raise ValueError for locations and weights, or offsets and logits, that do not fit `value`."""
    batch, _, heads, _ = value.shape
    levels = len(shapes) // 2
    # the numbers of queries and points are free
    fits = locations.dim() == 6 and locations.shape[-1] == 2
    fits = fits and (locations.shape[0], locations.shape[2], locations.shape[3]) == (batch, heads, levels)
    wanted = f"[B={batch}, Q, M={heads}, L={levels}, P, 2] floating point"
    _require(fits and locations.is_floating_point(), names[0], locations, wanted)
    fits = weights.shape == locations.shape[:-1] and weights.is_floating_point()
    _require(fits, names[1], weights, f"{list(locations.shape[:-1])} floating point, as {names[0]} say")
    _require_device(value, names[0], locations)
    _require_device(value, names[1], weights)


def _require_device(value: Tensor, name: str, tensor: Tensor) -> None:
    _require(tensor.device == value.device, name, tensor, f"on {value.device}, as value is")


def _require(condition: bool, name: str, tensor: Tensor, wanted: str) -> None:
    if not condition:
        raise ValueError(
            f"{name} must be {wanted}; got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def _accumulator(value: Tensor) -> torch.dtype:
    """The type in which `value` is sampled and summed."""
    if value.dtype == torch.float64:
        return torch.float64
    return torch.float32


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _typed_ready(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return _plain(locations, _accumulator(value)), _plain(weights, _accumulator(value))


def _typed_fused(
    value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in types that the kernels read."""
    wide = _accumulator(value)
    # under autocast both have value's type, and a conversion would cost time
    raw = wide
    if offsets.dtype == logits.dtype == value.dtype:
        raw = value.dtype
    return _plain(reference_points, wide), _plain(offsets, raw), _plain(logits, raw)


# ---- the operators


def _forward(
    value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str = "auto"
) -> Tensor:
    _check_ready(value, shapes, locations, weights)
    # kernels read contiguous tensors of few types
    run = backends.choose(backend, value.device)
    return run.forward(value.contiguous(), shape_pairs(shapes), *_typed_ready(value, locations, weights))


def _backward(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str
):
    run = backends.choose(backend, value.device)
    typed = _typed_ready(value, locations, weights)
    grads = run.backward(_plain(grad, value.dtype), value.contiguous(), shape_pairs(shapes), *typed)
    return _like(grads, (value, locations, weights))


def _fused_forward(
    value: Tensor,
    shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    backend: str = "auto",
) -> Tensor:
    _check_fused(value, shapes, reference_points, offsets, logits)
    run = backends.choose(backend, value.device)
    typed = _typed_fused(value, reference_points, offsets, logits)
    return run.fused_forward(value.contiguous(), shape_pairs(shapes), *typed)


def _fused_backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    backend: str,
    needs_reference: bool,
):
    run = backends.choose(backend, value.device)
    typed = _typed_fused(value, reference_points, offsets, logits)
    inputs = (value.contiguous(), shape_pairs(shapes), *typed)
    grads = run.fused_backward(_plain(grad, value.dtype), *inputs, needs_reference=needs_reference)
    return _like(grads, (value, reference_points, offsets, logits))


# gradients have the types of the inputs, which the kernels do not see
def _like(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))


def _fake_forward(
    value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str = "auto"
) -> Tensor:
    _check_ready(value, shapes, locations, weights)
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_fused_forward(
    value: Tensor, shapes: list[int], reference_points, offsets, logits, backend: str = "auto"
) -> Tensor:
    _check_fused(value, shapes, reference_points, offsets, logits)
    # a shape and a type are enough for a compiler
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(grad: Tensor, value: Tensor, shapes: list[int], *others):
    tensors = [other for other in others if isinstance(other, Tensor)]
    # needs_reference, or else the backend
    if others[-1] is False:
        tensors[0] = tensors[0].new_empty(0)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, *tensors))


def _save_inputs(ctx, inputs, output) -> None:
    # the backward computes the samples again
    value, ctx.shapes, *tensors, ctx.backend = inputs
    ctx.save_for_backward(value, *tensors)


def _gradient_by(name: str, skips_reference: bool) -> Callable:
    # shapes and backend have no gradient
    def gradient(ctx, grad: Tensor):
        value, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2 : 2 + len(tensors)]
        # those of an encoder are constants
        flags = needed[:1] if skips_reference else ()
        run = getattr(torch.ops.deformable, name)
        grad_value, *grads = run(grad, value, ctx.shapes, *tensors, ctx.backend, *flags)
        wanted = [x if need else None for x, need in zip(grads, needed, strict=True)]
        return grad_value, None, *wanted, None

    return gradient


def _autocast_for(name: str, device_type: str) -> Callable:
    """The operator under autocast: only the values are cast, so that locations stay float32."""

    def autocast(value: Tensor, *others):
        with torch.autocast(device_type, enabled=False):
            # float64 is a choice of the caller
            if value.dtype != torch.float64 and value.is_floating_point():
                value = value.to(torch.get_autocast_dtype(device_type))
            return getattr(torch.ops.deformable, name)(value, *others)

    return autocast


def _register(
    name: str,
    tensors: str,
    forward: Callable,
    backward: Callable,
    fake: Callable,
    grads: int,
    skips_reference: bool = False,
) -> None:
    """Register an operator `name`, and its gradient under `name`_backward.

    `tensors` are its arguments after the shapes; `grads` the number of its gradients. With
    `skips_reference` the gradient of the first of them is computed only where it is needed.
    """
    full, full_backward = f"deformable::{name}", f"deformable::{name}_backward"
    given = f"Tensor value, SymInt[] shapes, {tensors}, str backend"
    flags = ", bool needs_reference" if skips_reference else ""
    results = ", ".join(["Tensor"] * grads)
    torch.library.define(full, f'({given}="auto") -> Tensor')
    torch.library.define(full_backward, f"(Tensor grad, {given}{flags}) -> ({results})")
    torch.library.impl(full, "default", forward)
    torch.library.impl(full_backward, "default", backward)

    # for torch.compile, autograd and autocast
    torch.library.register_fake(full, fake)
    torch.library.register_fake(full_backward, _fake_backward)
    gradient = _gradient_by(f"{name}_backward", skips_reference)
    torch.library.register_autograd(full, gradient, setup_context=_save_inputs)
    _LIBRARY.impl(name, _autocast_for(name, "cpu"), "AutocastCPU")
    _LIBRARY.impl(name, _autocast_for(name, "cuda"), "AutocastCUDA")


# what is registered exists as long as this object
_LIBRARY = torch.library.Library("deformable", "FRAGMENT")
_register("ms_deform_attn", "Tensor locations, Tensor weights", _forward, _backward, _fake_forward, 3)
_register(
    "ms_deform_attn_fused",
    "Tensor reference_points, Tensor offsets, Tensor logits",
    _fused_forward,
    _fused_backward,
    _fake_fused_forward,
    4,
    skips_reference=True,
)
