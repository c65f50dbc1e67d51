"""Multi-scale deformable attention in Triton: forward and backward, plain and fused.

For CUDA machines without a compiler. Importing this module imports triton: without it, ImportError.
With TRITON_INTERPRET=1 in the environment before the first import of triton, the kernels run on the
CPU too.

Shape letters: B images, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
P points; R rows of one program, a row being one (image, query, head); K channels of one program; LP
the power of two from L * P up. T is the type of `value`: float32, float64, bfloat16 or float16. A
is the type to accumulate in: float64 if T is, else float32. Locations, weights and reference points
come in A; raw offsets and logits both in T or both in A.

All tensors are contiguous, on one device, of the shapes that the functions name; the caller has checked
that. A sample is inside if x_pixel > -1 and x_pixel < width, likewise y; NaN and infinity are
outside. A sample outside adds weight * 0 and gets zero gradients; pixels outside the map are not
read.
"""

# no `from __future__ import annotations`: the interpreter reads tl.constexpr from them
import contextlib
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import deterministic as ordered
from . import reference as plain

Shapes = Sequence[tuple[int, int]]

_TILE = 512  # elements of a program's [R, K] tile: four a thread, 128 bits of float32
_WIDEST = 128  # channels of a program at most
_LOGITS = 4096  # elements of its [R, LP] tile of logits at most: 32 a thread
# multiply and add in one instruction; the default depends on triton's version
_OPTIONS = {"enable_fp_fusion": True}


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """sum over levels and points of weight * sample, per head ("Deformable DETR", section 4.1, eq.
    3).

    Args:
        value: [B, S, M, D] T.
        shapes: (height, width) of the levels.
        locations: [B, Q, M, L, P, 2] A; x, y in [0, 1] of their level.
        weights: [B, Q, M, L, P] A.

    Returns:
        [B, Q, M * D] T.
    """
    return _forward(value, shapes, None, locations, weights)


def backward(
    grad: Tensor,
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for value, locations and weights, each of its input's shape and type.

    Args:
        grad: [B, Q, M * D] T.
        deterministic: sum the value's gradient in a fixed order, slower, instead of by atomics;
            None: as `torch.use_deterministic_algorithms` says.
    """
    scatter = not _fixed_order(deterministic)
    grads = _backward(grad, value, shapes, None, locations, weights, scatter)
    grad_value, _, grad_locations, grad_weights = grads
    if grad_value is None:
        grad_value = ordered.value_gradient(grad, value, shapes, locations, weights)
    return grad_value, grad_locations, grad_weights


def fused_forward(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`forward` at the locations that reference points and offsets give, with the softmax of the
    logits as weights.

    Args:
        value: [B, S, M, D] T.
        shapes: (height, width) of the levels.
        reference: [B, Q, L, 2] A, x, y in [0, 1] of the level: offsets are in pixels; or [B, Q, L,
            4] with width and height: offsets are in half boxes, divided among the points.
        offsets: [B, Q, M, L, P, 2] T or A.
        logits: [B, Q, M, L, P], typed as offsets; the softmax is over all L * P.

    Returns:
        [B, Q, M * D] T.
    """
    return _forward(value, shapes, reference, offsets, logits)


def fused_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Shapes,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    deterministic: bool | None = None,
    needs_reference: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fused_forward` for value, reference, offsets and logits, each of its input's
    shape and type.

    Args:
        grad: [B, Q, M * D] T.
        deterministic: sum the value's gradient in a fixed order, slower, instead of by atomics;
            None: as `torch.use_deterministic_algorithms` says.
        needs_reference: whether the gradient of reference is wanted; without, it is empty.
    """
    scatter = not _fixed_order(deterministic)
    grads = _backward(grad, value, shapes, reference, offsets, logits, scatter, needs_reference)
    grad_value, grad_reference, grad_offsets, grad_weights = grads
    if grad_reference is None:
        grad_reference = reference.new_empty(0)

    # the kernel gives the gradient of the weights
    weights = logits.to(reference.dtype).flatten(-2).softmax(-1)
    softmax_backward = torch.ops.aten._softmax_backward_data
    grad_logits = softmax_backward(grad_weights.flatten(-2), weights, -1, weights.dtype)
    grad_logits = grad_logits.view(logits.shape).to(logits.dtype)
    weights = weights.view(logits.shape)
    if grad_value is None:
        locations = plain.locate(shapes, reference, offsets.to(reference.dtype))
        grad_value = ordered.value_gradient(grad, value, shapes, locations, weights)
    return grad_value, grad_reference, grad_offsets, grad_logits


def _forward(
    value: Tensor, shapes: Shapes, reference: Tensor | None, points: Tensor, scores: Tensor
) -> Tensor:
    batch, queries, heads, levels, count = scores.shape
    out = value.new_empty(batch, queries, heads * value.shape[3])
    # without samples there is nothing to launch
    if not out.numel() or not levels * count:
        return out.zero_()
    inputs = (value, _level_table(tuple(shapes), value.device), reference, points, scores)
    sizes = _sizes(value, reference, scores)
    # a program for so many rows of so many channels
    rows = triton.cdiv(scores.shape[:3].numel(), sizes["R"])
    chunks = triton.cdiv(sizes["D"], sizes["K"])
    with _on(value.device):
        _forward_kernel[(rows * chunks,)](out, *inputs, *_extents(value, scores), **sizes, **_OPTIONS)
    return out


def _backward(
    grad: Tensor,
    value: Tensor,
    shapes: Shapes,
    reference: Tensor | None,
    points: Tensor,
    scores: Tensor,
    scatter: bool,
    needs_reference: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of value (None without `scatter`), reference (None unless needed), points, and
    weights. That of the weights is in A, and the kernel does not differentiate the softmax.
    """
    kind, device = _accumulator(value.dtype), value.device
    runs = bool(grad.numel() and scores.numel())
    # the kernel writes every element
    new = torch.empty if runs else torch.zeros
    grad_points = new(points.shape, dtype=points.dtype, device=device)
    grad_weights = new(scores.shape, dtype=kind, device=device)
    grad_value = grad_reference = None
    if scatter:
        grad_value = torch.zeros_like(value, dtype=kind)
    # heads are summed afterwards, in a fixed order
    if reference is not None and needs_reference:
        shape = (*scores.shape[:4], reference.shape[-1])
        grad_reference = new(shape, dtype=kind, device=device)

    if runs:
        grads = (grad_value, grad_reference, grad_points, grad_weights)
        inputs = (grad, value, _level_table(tuple(shapes), device), reference, points, scores)
        sizes = _sizes(value, reference, scores)
        programs = triton.cdiv(scores.shape[:3].numel(), sizes["R"])
        with _on(device):
            _backward_kernel[(programs,)](
                *grads, *inputs, *_extents(value, scores), SCATTER=scatter, **sizes, **_OPTIONS
            )
    if grad_value is not None:
        grad_value = grad_value.to(value.dtype)
    if grad_reference is not None:
        grad_reference = grad_reference.sum(2)
    return grad_value, grad_reference, grad_points, grad_weights


def _sizes(value: Tensor, reference: Tensor | None, scores: Tensor) -> dict:
    """The constants that a kernel is compiled for: those of the model, none of the images."""
    # powers of two: Triton's tiles have no other sizes
    heads, channels = value.shape[2:]
    levels, points = scores.shape[3:]
    width = min(triton.next_power_of_2(channels), _WIDEST)
    samples = triton.next_power_of_2(levels * points)
    return {
        "M": heads,
        "D": channels,
        "L": levels,
        "P": points,
        "COORDS": 0 if reference is None else reference.shape[-1],
        "A": tl.float64 if value.dtype == torch.float64 else tl.float32,
        "R": max(1, min(_TILE // width, _LOGITS // samples)),
        "K": width,
        "LP": samples,
    }


def _extents(value: Tensor, scores: Tensor) -> tuple[int, int, int]:
    """What changes from batch to batch: rows, rows of an image, tokens of an image."""
    # a row is one query of one head
    batch, queries, heads = scores.shape[:3]
    return batch * queries * heads, queries * heads, value.shape[1]


@cache  # for good: a recorded CUDA graph goes on reading it
def _level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[L, 3] int64: height, width and first token of the levels."""
    rows, start = [], 0
    for height, width in shapes:
        if height * width:
            rows.append((height, width, start))
        else:  # nothing lies between -1 and -1: every sample is outside of an empty level
            rows.append((-1, -1, start))
        start += height * width
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":  # a copy from pinned memory does not synchronise
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def _fixed_order(deterministic: bool | None) -> bool:
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    return deterministic


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """A block in which `device` is the current one, on which Triton launches."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()


# image sizes change from batch to batch: a kernel must not be compiled again for them
_CHANGING = ["rows", "image_rows", "tokens"]


@triton.jit(do_not_specialize=_CHANGING)
def _forward_kernel(
    out,
    value,
    levels,
    reference,
    points,
    scores,
    rows,
    image_rows,
    tokens,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    COORDS: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    LP: tl.constexpr,
):
    """out [rows, D]; a program computes R rows of K channels.

    If COORDS is 0, `points` are locations and `scores` weights. Else they are offsets and logits,
    with a reference of COORDS coordinates.
    """
    # addresses are 64 bits wide: a batch may have more elements than 32 bits count
    chunks: tl.constexpr = (D + K - 1) // K
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * R + tl.arange(0, R)
    active = row < rows
    row = tl.where(active, row, 0)  # rows beyond the last repeat the first and store nothing
    channel = program % chunks * K + tl.arange(0, K)
    value += (row // image_rows * tokens * M + row % M)[:, None] * D + channel[None, :]

    # the sum over levels and points
    highest, total = _softmax_terms(scores, row, L * P, COORDS, A, R, LP)
    sum_RK = tl.zeros([R, K], A)
    for level in range(L):
        height, width, start = _level(levels, level)
        for point in tl.range(0, P, loop_unroll_factor=4):
            sample = (row * L + level) * P + point
            weight = _weight(scores, sample, highest, total, COORDS, A)
            x, y = _pixel(points, reference, sample, row // M * L + level, height, width, P, COORDS, A)
            inside, top, left, y, x = _corner(x, y, height, width)
            v00, v01, v10, v11 = _corner_values(
                value, start, top, left, height, width, inside, channel, M, D, A
            )
            upper = v00 * (1 - x[:, None]) + v01 * x[:, None]
            lower = v10 * (1 - x[:, None]) + v11 * x[:, None]
            sum_RK += weight[:, None] * (upper * (1 - y[:, None]) + lower * y[:, None])
    tl.store(out + row[:, None] * D + channel[None, :], sum_RK, mask=active[:, None] & (channel < D)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def _backward_kernel(
    grad_value,
    grad_reference,
    grad_points,
    grad_weights,
    grad,
    value,
    levels,
    reference,
    points,
    scores,
    rows,
    image_rows,
    tokens,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    COORDS: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    LP: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Gradients of `_forward_kernel`; a program computes R rows of all channels.

    grad_value [B, S, M, D] A is added to, if SCATTER. grad_reference is [B, Q, M, L, COORDS] A, to
    be summed over M, or None. grad_points is of points' shape and type, grad_weights [B, Q, M, L, P] A that
    of the weights, before any softmax.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    active = row < rows
    row = tl.where(active, row, 0)
    # the first channel of the first token of the row's image and head
    tile = (row // image_rows * tokens * M + row % M)[:, None] * D + tl.arange(0, K)[None, :]
    highest, total = _softmax_terms(scores, row, L * P, COORDS, A, R, LP)
    for level in range(L):
        height, width, start = _level(levels, level)
        box = row // M * L + level
        box_x, box_y = tl.zeros([R], A), tl.zeros([R], A)
        box_width, box_height = tl.zeros([R], A), tl.zeros([R], A)
        for point in range(P):
            sample = (row * L + level) * P + point
            weight = _weight(scores, sample, highest, total, COORDS, A)
            x, y = _pixel(points, reference, sample, box, height, width, P, COORDS, A)
            inside, top, left, y, x = _corner(x, y, height, width)
            along_x, along_y, along_weight = tl.zeros([R], A), tl.zeros([R], A), tl.zeros([R], A)
            # the channels, K at a time
            for first in range(0, D, K):
                channel = first + tl.arange(0, K)
                used = (inside & active)[:, None] & (channel < D)[None, :]
                grad_RK = tl.load(grad + row[:, None] * D + channel[None, :], mask=used, other=0.0).to(A)
                v00, v01, v10, v11 = _corner_values(
                    value + tile + first, start, top, left, height, width, inside, channel, M, D, A
                )
                upper = v00 * (1 - x[:, None]) + v01 * x[:, None]
                lower = v10 * (1 - x[:, None]) + v11 * x[:, None]
                slope = (v01 - v00) * (1 - y[:, None]) + (v11 - v10) * y[:, None]
                along_x += tl.sum(grad_RK * slope, 1)
                along_y += tl.sum(grad_RK * (lower - upper), 1)
                along_weight += tl.sum(grad_RK * (upper * (1 - y[:, None]) + lower * y[:, None]), 1)
                if SCATTER:
                    share = weight[:, None] * grad_RK
                    _scatter(
                        grad_value + tile + first, share, start, top, left, y, x, height, width, used, M, D
                    )
            tl.store(grad_weights + sample, along_weight, mask=active)
            # an infinite weight times the zero outside would be NaN
            pixel_x = tl.where(inside, weight * along_x, 0.0)
            pixel_y = tl.where(inside, weight * along_y, 0.0)
            grad_x, grad_y = pixel_x * width.to(A), pixel_y * height.to(A)  # for the location
            box_x += grad_x
            box_y += grad_y
            # offsets are in pixels around points, in parts of the box around boxes
            if COORDS == 2:
                grad_x, grad_y = pixel_x, pixel_y
            if COORDS == 4:
                step: tl.constexpr = 0.5 / P
                offset_x, offset_y = _pair(points, sample, A)
                box_width += tl.where(inside, grad_x * offset_x * step, 0.0)
                box_height += tl.where(inside, grad_y * offset_y * step, 0.0)
                reach_x, reach_y = _pair(reference, box * 2 + 1, A)
                grad_x = tl.where(inside, grad_x * reach_x * step, 0.0)
                grad_y = tl.where(inside, grad_y * reach_y * step, 0.0)
            _store_pair(grad_points, sample, grad_x, grad_y, active)
        if grad_reference is not None:
            if COORDS == 2:
                _store_pair(grad_reference, row * L + level, box_x, box_y, active)
            if COORDS == 4:
                _store_pair(grad_reference, (row * L + level) * 2, box_x, box_y, active)
                _store_pair(grad_reference, (row * L + level) * 2 + 1, box_width, box_height, active)


@triton.jit
def _level(levels, level):
    """height, width, first token of a level: int64 scalars."""
    return tl.load(levels + level * 3), tl.load(levels + level * 3 + 1), tl.load(levels + level * 3 + 2)


@triton.jit
def _softmax_terms(
    scores, row, COUNT: tl.constexpr, COORDS: tl.constexpr, A: tl.constexpr, R: tl.constexpr, LP: tl.constexpr
):
    """Highest of a row's logits, and the sum of exp(logit - highest): [R] each. For logits only."""
    highest, total = tl.zeros([R], A), tl.zeros([R], A)
    if COORDS:
        sample = tl.arange(0, LP)
        used = (sample < COUNT)[None, :] & (row >= 0)[:, None]
        logit = tl.load(scores + row[:, None] * COUNT + sample[None, :], mask=used, other=-float("inf")).to(A)
        highest = tl.max(logit, 1)
        total = tl.sum(tl.exp(logit - highest[:, None]), 1)
    return highest, total


@triton.jit
def _weight(scores, sample, highest, total, COORDS: tl.constexpr, A: tl.constexpr):
    """The attention weight of each row's sample, [R]."""
    weight = tl.load(scores + sample).to(A)
    if COORDS:
        weight = tl.exp(weight - highest) / total
    return weight


@triton.jit
def _pixel(
    points, reference, sample, box, height, width, P: tl.constexpr, COORDS: tl.constexpr, A: tl.constexpr
):
    """x, y of each row's sample [R] in pixels: 0 is the center of the first pixel.

    `box` [R] are the numbers of the reference points.
    """
    x, y = _pair(points, sample, A)
    width, height = width.to(A), height.to(A)
    if COORDS == 0:
        x, y = x * width, y * height
    if COORDS == 2:
        center_x, center_y = _pair(reference, box, A)
        x, y = center_x * width + x, center_y * height + y
    if COORDS == 4:
        step: tl.constexpr = 0.5 / P
        center_x, center_y = _pair(reference, box * 2, A)
        reach_x, reach_y = _pair(reference, box * 2 + 1, A)
        x, y = (center_x + x * reach_x * step) * width, (center_y + y * reach_y * step) * height
    return x - 0.5, y - 0.5


@triton.jit
def _pair(pointer, index, A: tl.constexpr):
    """Elements 2 * index and 2 * index + 1, in A: [R] each."""
    return tl.load(pointer + index * 2).to(A), tl.load(pointer + index * 2 + 1).to(A)


@triton.jit
def _store_pair(pointer, index, first, second, mask):
    tl.store(pointer + index * 2, first, mask=mask)
    tl.store(pointer + index * 2 + 1, second, mask=mask)


@triton.jit
def _corner(x, y, height, width):
    """Whether a sample touches the map, row and column of its upper left pixel, and the rest y, x.

    [R] each.
    """
    inside = (x > -1) & (x < width.to(x.dtype)) & (y > -1) & (y < height.to(y.dtype))
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)  # NaN and infinity are no integers
    left, top = tl.floor(x), tl.floor(y)
    return inside, top.to(tl.int64), left.to(tl.int64), y - top, x - left


@triton.jit
def _corner_values(
    value, start, top, left, height, width, inside, channel, M: tl.constexpr, D: tl.constexpr, A: tl.constexpr
):
    """The four pixels around a sample, upper then lower, left then right: [R, K] each.

    Those outside of the map are 0 and not read.
    """
    # a corner may lie outside though the sample touches the map
    up, down, before, after = inside & (top >= 0), inside & (top + 1 < height), left >= 0, left + 1 < width
    v00 = _pixel_values(value, start + top * width + left, up & before, channel, M, D, A)
    v01 = _pixel_values(value, start + top * width + left + 1, up & after, channel, M, D, A)
    v10 = _pixel_values(value, start + (top + 1) * width + left, down & before, channel, M, D, A)
    v11 = _pixel_values(value, start + (top + 1) * width + left + 1, down & after, channel, M, D, A)
    return v00, v01, v10, v11


@triton.jit
def _pixel_values(value, token, valid, channel, M: tl.constexpr, D: tl.constexpr, A: tl.constexpr):
    """value [R, K] points to token 0; the values of `token` [R] where valid, else zero."""
    mask = valid[:, None] & (channel < D)[None, :]
    return tl.load(value + token[:, None] * (M * D), mask=mask, other=0.0).to(A)


@triton.jit
def _scatter(
    grad_value, share, start, top, left, y, x, height, width, used, M: tl.constexpr, D: tl.constexpr
):
    """Add weight * grad, `share` [R, K], to the four pixels around a sample by bilinear weights."""
    up, down = used & (top >= 0)[:, None], used & (top + 1 < height)[:, None]
    before, after = (left >= 0)[:, None], (left + 1 < width)[:, None]
    # in any order: see `deterministic`
    upper = grad_value + (start + top * width + left)[:, None] * (M * D)
    lower = upper + width * (M * D)
    share_upper, share_lower, x = share * (1 - y[:, None]), share * y[:, None], x[:, None]
    tl.atomic_add(upper, share_upper * (1 - x), mask=up & before, sem="relaxed")
    tl.atomic_add(upper + M * D, share_upper * x, mask=up & after, sem="relaxed")
    tl.atomic_add(lower, share_lower * (1 - x), mask=down & before, sem="relaxed")
    tl.atomic_add(lower + M * D, share_lower * x, mask=down & after, sem="relaxed")
