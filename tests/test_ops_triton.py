"""The Triton kernels against the reference in float64.

Triton decides when it is imported whether kernels are compiled or interpreted. So
`test_the_kernels_on_the_cpu` runs this file again in a process of its own with TRITON_INTERPRET=1,
where the tests marked `on_device` take CPU tensors; in the ordinary process they need a GPU.

What the interpreter does otherwise than a GPU, with NumPy underneath:
- float32 to bfloat16 cuts off instead of rounding to nearest: an error of one unit in the last
  place, not half a one.
- tl.max is np.nanmax, which warns of NaN; a GPU passes over NaN as well. Sums and masked loads
  treat NaN as a GPU does.
- Programs run one after the other, so that it can't show a race.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch

from models.ops import reference as plain
from tests.helpers import run

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.ops import triton_backend as ours

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KERNELS = (ours._forward_kernel, ours._backward_kernel)
SHAPES = [(6, 4), (3, 2)]
SEEN_BY_NUMPY = ["ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning"]

pytestmark = [pytest.mark.filterwarnings(text) for text in SEEN_BY_NUMPY]


def on_device(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(
    batch=2,
    heads=2,
    channels=4,
    queries=3,
    points=2,
    shapes=SHAPES,
    dtype=torch.float64,
    seed=0,
    device=DEVICE,
):
    """grad, value, shapes, locations, weights, in the types of the contract."""
    generator = torch.Generator().manual_seed(seed)

    def random(make, *size, kind=None):
        return make(*size, generator=generator, dtype=torch.float64).to(device, kind or accumulator(dtype))

    tokens = sum(h * w for h, w in shapes)
    value = random(torch.randn, batch, tokens, heads, channels, kind=dtype)
    # a good part of the points lies outside
    locations = random(torch.rand, batch, queries, heads, len(shapes), points, 2) * 1.6 - 0.3
    weights = random(torch.rand, batch, queries, heads, len(shapes), points)
    grad = random(torch.randn, batch, queries, heads * channels, kind=dtype)
    return grad, value, shapes, locations, weights


def fused_inputs(coordinates=2, raw=None, points=2, seed=0, **options):
    """grad, value, shapes, reference, offsets, logits; `raw` is the type of the last two, value's
    if None.
    """
    grad, value, shapes, locations, weights = inputs(points=points, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    batch, queries, _, levels = weights.shape[:4]
    kind, raw = locations.dtype, raw or value.dtype
    box = torch.rand(batch, queries, levels, coordinates, generator=generator, dtype=torch.float64)
    offsets = torch.randn(locations.shape, generator=generator, dtype=torch.float64) * 2
    logits = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    return (
        grad,
        value,
        shapes,
        box.to(value.device, kind),
        offsets.to(value.device, raw),
        logits.to(value.device, raw),
    )


def expected(grad, value, shapes, locations, weights):
    """Output and gradients by autograd through the reference, in float64 on the CPU; empty levels
    give nothing.
    """
    leaves = [x.detach().cpu().double().requires_grad_() for x in (value, locations, weights)]
    kept = [i for i, (h, w) in enumerate(shapes) if h * w]
    parts = leaves[1][:, :, :, kept], leaves[2][:, :, :, kept]
    out = plain.forward(leaves[0], [shapes[i] for i in kept], *parts)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.cpu().double())


def expected_fused(grad, value, shapes, reference, offsets, logits):
    leaves = [x.detach().cpu().double().requires_grad_() for x in (value, reference, offsets, logits)]
    value, reference, offsets, logits = leaves
    kept = [i for i, (h, w) in enumerate(shapes) if h * w]
    sizes = torch.tensor([[shapes[i][1], shapes[i][0]] for i in kept], dtype=torch.float64)
    box, shift = reference[:, :, None, kept, None], offsets[:, :, :, kept]
    if reference.shape[-1] == 2:
        locations = box + shift / sizes[:, None]
    else:
        locations = box[..., :2] + shift / offsets.shape[4] * box[..., 2:] * 0.5
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)[:, :, :, kept]
    out = plain.forward(value, [shapes[i] for i in kept], locations, weights)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.cpu().double())


def everything(args, deterministic=False):
    """Output and gradients of the kernels, fused if that many arguments are given."""
    forward, backward = (
        (ours.fused_forward, ours.fused_backward) if len(args) == 6 else (ours.forward, ours.backward)
    )
    return forward(*args[1:]), *backward(*args, deterministic)


def agree(got, wanted, args):
    """Types and shapes of the inputs; values within one unit in the last place of each type and the
    sums' rounding.
    """
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    rounding = 200 * torch.finfo(accumulator(args[1].dtype)).eps
    for name, ours_, theirs, like in zip(
        ("out", "value", "points", "more", "most"), got, wanted, tensors, strict=False
    ):
        assert (ours_.dtype, ours_.shape, ours_.is_contiguous()) == (like.dtype, like.shape, True), name
        scale = max(theirs.abs().max().item(), 1) if theirs.numel() else 1
        tolerance = {"rtol": torch.finfo(like.dtype).eps, "atol": rounding * scale}
        torch.testing.assert_close(
            ours_.cpu().double(), theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif(INTERPRETED, reason="is this run")
def test_the_kernels_on_the_cpu():
    done = run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, env={"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 30, 32, 33, 64, 71, 130])
def test_any_type_and_number_of_channels(dtype, channels):
    args = inputs(dtype=dtype, channels=channels)
    agree(everything(args), expected(*args), args)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 32, 130])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_fused(dtype, channels, coordinates):
    args = fused_inputs(coordinates, dtype=dtype, channels=channels)
    agree(everything(args), expected_fused(*args), args)


@on_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_inputs_may_have_the_accumulator_type(dtype):
    args = fused_inputs(4, raw=torch.float32, dtype=dtype)
    agree(everything(args), expected_fused(*args), args)


@on_device
@pytest.mark.parametrize(("levels", "points"), [(1, 1), (1, 3), (3, 1), (2, 5), (4, 4)])
def test_levels_and_points(levels, points):
    shapes = [(5, 7), (3, 4), (2, 2), (1, 1)][:levels]
    args = inputs(shapes=shapes, points=points)
    agree(everything(args), expected(*args), args)
    for coordinates in (2, 4):
        args = fused_inputs(coordinates, shapes=shapes, points=points)
        agree(everything(args), expected_fused(*args), args)


@on_device
@pytest.mark.parametrize("empty", [(0, 0), (0, 5), (5, 0)])
def test_empty_levels_give_nothing(empty):
    shapes = [empty, (4, 3), empty, (2, 2)]
    args = inputs(shapes=shapes)
    args[0][0, 0, 0] = math.nan  # the zeros are exact
    assert all(x[:, :, :, [0, 2]].count_nonzero() == 0 for x in everything(args)[2:])
    for args in (inputs(shapes=shapes), fused_inputs(2, shapes=shapes), fused_inputs(4, shapes=shapes)):
        wanted = (expected if len(args) == 5 else expected_fused)(*args)
        agree(everything(args), wanted, args)
        agree(everything(args, deterministic=True), wanted, args)


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", ["batch", "heads", "channels", "queries", "points"])
def test_nothing_of_something(size, deterministic):
    for args in (inputs(**{size: 0}), fused_inputs(2, **{size: 0}), fused_inputs(4, **{size: 0})):
        got = everything(args, deterministic)
        for result, like in zip(got, [x for x in args if isinstance(x, torch.Tensor)], strict=True):
            assert result.shape == like.shape
            assert result.count_nonzero() == 0


@on_device
@pytest.mark.parametrize("shapes", [[], [(0, 0)], [(0, 4), (3, 0)]])
def test_no_tokens(shapes):
    for args in (inputs(shapes=shapes), fused_inputs(2, shapes=shapes)):
        assert all(x.count_nonzero() == 0 for x in everything(args))


@on_device
def test_one_query():
    for args, by_reference in ((inputs(queries=1), expected), (fused_inputs(queries=1), expected_fused)):
        agree(everything(args), by_reference(*args), args)


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
def test_more_rows_than_a_program_takes(deterministic):
    """Several programs, the last one part empty, of several images."""
    args = inputs(batch=3, queries=7, heads=3, channels=33)
    agree(everything(args, deterministic), expected(*args), args)
    args = fused_inputs(4, batch=3, queries=7, heads=3, channels=33)
    agree(everything(args, deterministic), expected_fused(*args), args)


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
def test_borders(deterministic):
    """Samples on pixels, between them, on the edge of the map and beyond, in numbers that are
    exact.
    """
    shapes = [(4, 8), (2, 2)]
    steps = torch.arange(-8, 25, dtype=torch.float64, device=DEVICE) / 16
    locations = (
        torch.cartesian_prod(steps, steps)[None, :, None, None, None].expand(1, -1, 1, 2, 1, 2).contiguous()
    )
    grad, value, shapes, _, weights = inputs(1, 1, 3, len(steps) ** 2, 1, shapes)
    args = grad, value, shapes, locations, weights
    wanted = list(expected(*args))
    sizes = torch.tensor([[w, h] for h, w in shapes])[:, None]
    pixels = locations.cpu() * sizes - 0.5
    inside = ((pixels > -1) & (pixels < sizes)).all(-1)
    wanted[2] = torch.where(inside[..., None], wanted[2], 0)  # aten has a slope at exactly -1
    got = everything(args, deterministic)
    agree(got, wanted, args)
    assert got[2].cpu()[~inside].count_nonzero() == got[3].cpu()[~inside].count_nonzero() == 0


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_locations_that_are_no_numbers_are_outside(bad, deterministic):
    args = inputs(dtype=torch.float32)
    spoiled, none = args[3].clone(), args[4].clone()
    spoiled[0, 1, 1, 0, 1, 0] = spoiled[1, 2, 0, 1, 0, 1] = bad
    none[0, 1, 1, 0, 1] = none[1, 2, 0, 1, 0] = 0
    got = everything((*args[:3], spoiled, args[4]), deterministic)
    wanted = list(expected(*args[:4], none))
    for index in ((0, 1, 1, 0, 1), (1, 2, 0, 1, 0)):
        wanted[3][index] = 0
        assert got[2][index].count_nonzero() == got[3][index].count_nonzero() == 0
    agree(got, wanted, args)


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_offsets_and_references_that_are_no_numbers(bad, coordinates, deterministic):
    """As if the point lay far outside: it takes part in the softmax, and gets no gradient but that
    of its logit.
    """
    args = fused_inputs(coordinates, dtype=torch.float32)
    far, spoiled = list(args), list(args)
    for changed, offset, box in ((far, 1e4, 1e4), (spoiled, bad, bad)):
        changed[3], changed[4] = args[3].clone(), args[4].clone()
        changed[3][1, 0, 1, -1], changed[4][0, 1, 1, 0, 1] = box, offset
    if coordinates == 4:  # a wide box is no far one
        far[3][1, 0, 1, 0] = 1e9
    got = everything(spoiled, deterministic)
    agree(got, expected_fused(*far), args)
    assert got[2][1, 0, 1].count_nonzero() == got[3][0, 1, 1, 0, 1].count_nonzero() == 0


@on_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(bad, deterministic):
    """They show in their own output, even from outside, and give no gradient from there."""
    args = inputs(dtype=torch.float32)
    wanted = expected(*args)
    args[3][0, 1, 1, 0, 1], args[4][0, 1, 1, 0, 1] = 7.0, bad
    got = everything(args, deterministic)
    assert got[0][0, 1, 4:].isnan().all()
    others = torch.ones_like(got[0], dtype=torch.bool)
    others[0, 1, 4:] = False
    torch.testing.assert_close(got[0][others].cpu().double(), wanted[0][others.cpu()], rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in got[1:])
    assert got[2][0, 1, 1, 0, 1].count_nonzero() == got[3][0, 1, 1, 0, 1].count_nonzero() == 0


@on_device
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(bad):
    """One logit spoils the weights of its own query and head; minus infinity is a weight of zero."""
    args = fused_inputs(dtype=torch.float32)
    args[4][:] = 0  # all inside
    args[5][0, 1, 1, 0, 1] = bad
    wanted = expected_fused(*args)
    got = everything(args)
    for ours_, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_.cpu().double(), theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@on_device
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_spoiled_pixel_stays_where_it_is(bad):
    """Pixel (0, 3) of 6 x 4 is seen by its neighbours' samples, by no other, though those at x < 0
    are next to it in memory.
    """
    args = inputs(batch=1, heads=1, queries=4, points=1, shapes=[(6, 4)])
    spots = [
        [-0.05, 0.3],
        [0.9, 0.05],
        [1.3, 0.05],
        [0.1, 0.26],
    ]  # left edge, at the pixel, outside, left edge of the next row
    args[3][0, :, 0, 0, 0] = torch.tensor(spots, dtype=torch.float64)
    wanted = expected(*args)
    args[1][0, 3] = bad
    got = everything(args)
    for ours_, theirs in ((got[0], wanted[0]), (got[2], wanted[2]), (got[3], wanted[3])):
        assert not ours_[0, 1].isfinite().any()
        torch.testing.assert_close(ours_[0, [0, 2, 3]].cpu(), theirs[0, [0, 2, 3]], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1].cpu(), wanted[1], rtol=0, atol=1e-12)


@on_device
def test_infinite_gradients_stay_where_they_are():
    args = inputs(batch=1, heads=1, queries=2, points=1, shapes=[(6, 4)])
    args[3][:], args[0][0, 0] = 4.0, math.inf
    assert all(x.count_nonzero() == 0 for x in everything(args)[1:])
    args[3][0, 0, 0, 0, 0] = torch.tensor([0.0, 0.5])  # x = -0.5, y = 2.5
    for deterministic in (False, True):
        touched = everything(args, deterministic)[1]
        assert (~touched.isfinite()).any(-1).nonzero()[:, 1].tolist() == [2 * 4, 3 * 4]


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype):
    """The same bits twice, and the gradients that the atomics sum up."""
    for args, by_reference in (
        (inputs(dtype=dtype), expected),
        (fused_inputs(4, dtype=dtype), expected_fused),
    ):
        first, second = everything(args, deterministic=True), everything(args, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        agree(first, by_reference(*args), args)


@on_device
@pytest.mark.parametrize("coordinates", [2, 4])
def test_without_the_gradient_of_reference_points(coordinates):
    args = fused_inputs(coordinates)
    wanted = ours.fused_backward(*args, deterministic=True)
    got = ours.fused_backward(*args, deterministic=True, needs_reference=False)
    assert got[1].numel() == 0
    assert all(torch.equal(got[i], wanted[i]) for i in (0, 2, 3))


@on_device
def test_deterministic_if_torch_is(monkeypatch):
    calls = []
    monkeypatch.setattr(ours.ordered, "value_gradient", lambda *args: calls.append(args))
    for args, backward in ((inputs(), ours.backward), (fused_inputs(), ours.fused_backward)):
        backward(*args)
        assert not calls
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert backward(*args)[0] is None
        assert len(calls) == 1
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        calls.clear()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
def test_image_sizes_are_no_reason_to_compile_again(compile_alone):
    """Nor are the numbers of images and queries: 1 and multiples of 16 are what Triton would take
    for special.
    """
    counts = []
    for shapes, batch, queries in (
        ([(6, 4), (3, 2)], 2, 16),
        ([(1, 1), (0, 0)], 1, 1),
        ([(8, 8), (4, 4)], 1, 17),
    ):
        args = fused_inputs(
            4, shapes=shapes, batch=batch, queries=queries, heads=1, dtype=torch.float32, device="cpu"
        )
        everything(args)
        counts.append([len(kernel.device_caches[compile_alone][0]) for kernel in KERNELS])
    assert counts == [[1, 1]] * 3


@pytest.fixture
def compile_alone(tmp_path, monkeypatch):
    """Launches take CPU tensors, compile for a device that is not there, whose name this gives, and
    stop.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = "nowhere"
    driver = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver)

    def launch(kernel, grid):
        return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(triton.JITFunction, "__getitem__", launch)
    yield device
    for kernel in KERNELS:
        kernel.device_caches.pop(device, None)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="takes 25 GB")
def test_more_elements_than_32_bits_count():
    """Only the last pixel of 2^31 elements and more is seen."""
    height, width, channels = 8200, 8200, 32
    value = torch.zeros(1, height * width, 1, channels, device=DEVICE, dtype=torch.float16)
    assert value.numel() > 2**31
    value[0, -1] = 1
    locations = torch.full((1, 1, 1, 1, 1, 2), 1 - 0.5 / width, device=DEVICE)
    grad = torch.ones(1, 1, channels, device=DEVICE, dtype=torch.float16)
    out, grad_value, _, grad_weights = everything(
        (grad, value, [(height, width)], locations, torch.ones_like(locations[..., 0]))
    )
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=0.01)
    torch.testing.assert_close(grad_value[0, -1], value[0, -1], rtol=0, atol=0.01)
    torch.testing.assert_close(
        grad_weights.flatten().cpu(), torch.tensor([float(channels)]), rtol=0, atol=0.1
    )


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nobody_waits_for_the_device():
    plain_args, fused_args = inputs(dtype=torch.float32), fused_inputs(2, dtype=torch.float32)
    everything(plain_args)  # compile
    everything(fused_args)
    ours._level_table.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for args in (plain_args, fused_args):
            everything(args)
            everything(args, deterministic=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "fp16", "bf16"])
def test_they_compile_for_gpus_that_are_not_here(dtype, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    coordinates = {80: 0, 90: 4}[capability]
    for kernel in KERNELS:
        compiled = compile_kernel(kernel, dtype, coordinates, capability)
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert compiled.asm["cubin"]


def compile_kernel(kernel, dtype, coordinates, capability):
    """8 heads of 32 channels, 4 levels, 4 points, as the published models have."""
    kind = "fp64" if dtype == "fp64" else "fp32"
    raw = dtype if coordinates else kind
    constants = {
        "M": 8,
        "D": 32,
        "L": 4,
        "P": 4,
        "COORDS": coordinates,
        "A": getattr(tl, f"float{kind[2:]}"),
        "R": 16,
        "K": 32,
        "LP": 16,
        "SCATTER": True,
        **({} if coordinates else {"reference": None, "grad_reference": None}),
    }
    pointers = {
        "out": dtype,
        "value": dtype,
        "grad": dtype,
        "levels": "i64",
        "points": raw,
        "scores": raw,
        "reference": kind,
        "grad_value": kind,
        "grad_points": raw,
        "grad_weights": kind,
        "grad_reference": kind,
    }
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    kinds = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names}
    signature = kinds | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True}
    )
