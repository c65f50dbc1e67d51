"""The attention operator: its contract, its gradients, and the layer around it."""

from __future__ import annotations

import math

import pytest
import torch

from models.ops import backends, reference
from models.ops.functions import (
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_core_pytorch,
    ms_deform_attn_fused,
)
from models.ops.modules import MSDeformAttn

SHAPES = [(6, 4), (3, 2)]


def inputs(batch=2, heads=3, channels=4, queries=5, points=2, shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=dtype)
    # a good part of the points lies outside
    locations = (
        torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator, dtype=dtype) * 1.6
        - 0.3
    )
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=generator, dtype=dtype)
    return value, shapes, locations, weights


def by_hand(value, shapes, locations, weights):
    """The definition, one sampling point after the other."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = value.new_zeros(batch, queries, heads, channels)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        x, y = (locations[b, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    part = (
                                        (1 - abs(y - row))
                                        * (1 - abs(x - column))
                                        * weights[b, q, m, level, p]
                                    )
                                    out[b, q, m] += part * value[b, start + row * width + column, m]
                    start += height * width
    return out.flatten(2)


def test_forward_is_the_definition():
    args = inputs()
    torch.testing.assert_close(ms_deform_attn(*args), by_hand(*args), atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_definition():
    value, shapes, locations, weights = inputs(batch=1, heads=2, channels=3, queries=3)
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, x, w: ms_deform_attn(v, shapes, x, w), (value, locations, weights)
    )


def test_backward_equals_autograd_through_the_reference():
    value, shapes, locations, weights = inputs(seed=3)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    grad = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted = torch.autograd.grad(reference.forward(value, shapes, locations, weights), leaves, grad)
    got = torch.autograd.grad(ms_deform_attn(value, shapes, locations, weights), leaves, grad)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fused_gradients_equal_autograd_through_its_parts(backend, coordinates):
    """Of the whole way from reference points, offsets and logits, boxes and points outside among
    them.
    """
    value, shapes, locations, weights = inputs(seed=4)
    around = torch.rand(2, 5, 2, coordinates, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    leaves = [x.requires_grad_() for x in (value, around, 8 * locations - 4, 4 * weights)]
    plain = reference.fused_forward(leaves[0], shapes, *leaves[1:])
    out = ms_deform_attn_fused(leaves[0], shapes, *leaves[1:], backend=backend)
    torch.testing.assert_close(out, plain, atol=1e-12, rtol=0)
    grad = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted, got = torch.autograd.grad(plain, leaves, grad), torch.autograd.grad(out, leaves, grad)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_gradient_of_reference_points_is_computed_for_those_who_need_it(
    backend, coordinates, monkeypatch
):
    value, shapes, locations, weights = inputs(seed=4)
    around = torch.rand(2, 5, 2, coordinates, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    leaves = [x.requires_grad_() for x in (value, 8 * locations - 4, 4 * weights)]
    module = backends.choose(backend, value.device)
    run, results = module.fused_backward, []
    monkeypatch.setattr(
        module, "fused_backward", lambda *args, **flags: results.append(run(*args, **flags)) or results[-1]
    )
    gradients = []
    for needed in (False, True):
        points = around.clone().requires_grad_(needed)
        out = ms_deform_attn_fused(leaves[0], shapes, points, *leaves[1:], backend=backend)
        wanted = [*leaves, points] if needed else leaves
        gradients.append(torch.autograd.grad(out.sum(), wanted)[: len(leaves)])
        assert results[-1][1].numel() == (points.numel() if needed else 0)
    for without, with_reference in zip(*gradients, strict=True):
        assert torch.equal(without, with_reference)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_registration(needs_grad):
    value, _, locations, weights = inputs(dtype=torch.float32)
    tensors = [t.requires_grad_(needs_grad) for t in (value, locations, weights)]
    flat = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(torch.ops.deformable.ms_deform_attn, (tensors[0], flat, *tensors[1:]))


def test_published_calls_fit():
    value, shapes, locations, weights = inputs()
    tensor_shapes = torch.tensor(shapes)
    starts = torch.tensor([0, 24])
    wanted = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(
        MSDeformAttnFunction.apply(value, tensor_shapes, starts, locations, weights, 64), wanted
    )
    plain = ms_deform_attn_core_pytorch(value, tensor_shapes, locations, weights)
    torch.testing.assert_close(plain, wanted, atol=1e-12, rtol=0)


def test_far_away_points_count_nothing():
    value, shapes, locations, weights = inputs()
    assert not ms_deform_attn(value, shapes, locations + 50, weights).any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), "value"),
        (lambda v, s, x, w: (v.long(), s, x, w), "value"),
        (lambda v, s, x, w: (v, [(6, 4), (3, 3)], x, w), "spatial_shapes"),
        (lambda v, s, x, w: (v, s, x[..., :1], w), "locations"),
        (lambda v, s, x, w: (v, s, x[:1], w), "locations"),
        (lambda v, s, x, w: (v, s, x[:, :, :, :1], w), "locations"),
        (lambda v, s, x, w: (v, s, x, w[:, :3]), "weights"),
        (lambda v, s, x, w: (v, s, x.to("meta"), w), "locations"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        ms_deform_attn(*change(*inputs()))


def test_layer_starts_as_published():
    layer = MSDeformAttn(64, n_levels=2, n_heads=4, n_points=3)
    assert not layer.sampling_offsets.weight.any()
    assert not layer.attention_weights.weight.any()
    offsets = layer.sampling_offsets.bias.view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for head in range(4):
        for point in range(3):
            torch.testing.assert_close(
                offsets[head, :, point], directions[head].expand(2, -1) * (point + 1), atol=1e-6, rtol=0
            )


def test_layer_with_boxes_stays_inside_them():
    """Offsets of one point at the outermost start in a box reach its border: centre + offset / P *
    size / 2.
    """
    layer = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=2)
    boxes = torch.tensor([0.5, 0.4, 0.2, 0.1]).expand(1, 1, 2, 4)
    offsets = layer.sampling_offsets(torch.zeros(1, 1, 32)).unflatten(-1, (4, 2, 2, 2))
    locations = reference.locate(SHAPES, boxes, offsets).detach()
    assert locations[..., 0].max() == pytest.approx(0.6)
    assert locations[..., 1].min() == pytest.approx(0.35)
    with pytest.raises(ValueError, match="2 or 4"):
        layer(torch.zeros(1, 1, 32), torch.zeros(1, 1, 2, 3), torch.zeros(1, 30, 32), SHAPES)


def test_padding_does_not_matter():
    layer = MSDeformAttn(32, n_levels=2, n_heads=4, n_points=2)
    torch.nn.init.normal_(layer.sampling_offsets.weight)
    query, points, tokens = torch.randn(1, 7, 32), torch.rand(1, 7, 2, 2), torch.randn(1, 30, 32)
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[:, 20:] = True
    changed = tokens.masked_fill(mask[..., None], 9.0)
    first, second = (layer(query, points, t, torch.tensor(SHAPES), None, mask) for t in (tokens, changed))
    assert torch.equal(first, second)
    assert not torch.equal(first, layer(query, points, tokens, SHAPES))


def test_compiles_without_a_break():
    layer = torch.compile(
        MSDeformAttn(32, n_levels=2, n_heads=4, n_points=2), fullgraph=True, backend="aot_eager"
    )
    out = layer(
        torch.randn(1, 7, 32), torch.rand(1, 7, 2, 2), torch.randn(1, 30, 32, requires_grad=True), SHAPES
    )
    out.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_equals_cpu(dtype):
    value, shapes, locations, weights = inputs(dtype=dtype)
    on_gpu = ms_deform_attn(value.cuda(), shapes, locations.cuda(), weights.cuda())
    torch.testing.assert_close(
        on_gpu.cpu(), ms_deform_attn(value, shapes, locations, weights, backend="reference")
    )
