"""Every backend and type of the attention operators against the reference in float64, over random
shapes and locations.

The locations include those far outside, exactly on borders and pixel centres, infinite and NaN.
Expected values are computed from the inputs as rounded to the type under test, by the reference in
float64.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine with a GPU and without a network may lack it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.ops import compiled, reference
from models.ops.backends import missing
from models.ops.functions import ms_deform_attn, ms_deform_attn_fused

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# of values around 1: what the output's rounding and the sums in float32 leave
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CPU_SETS = ["baseline", "avx2", "avx512"]  # one that the processor lacks falls back to the next


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    channels: int
    queries: int
    points: int
    shapes: tuple[tuple[int, int], ...]
    form: str  # "ready", or offsets around "points" or "boxes"
    locations: str
    seed: int
    transposed: bool  # inputs that are not contiguous


CASES = st.builds(
    Case,
    batch=st.sampled_from([1, 2, 3, 0]),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 20, 30, 32, 33, 48, 64, 71, 100]),
    queries=st.sampled_from([1, 2, 5, 16, 17, 40, 0]),
    points=st.sampled_from([1, 2, 3, 4, 5, 0]),
    shapes=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4).map(tuple),
    form=st.sampled_from(["ready", "points", "boxes"]),
    locations=st.sampled_from(["inside", "around", "far", "borders", "not finite"]),
    seed=st.integers(0, 2**31),
    transposed=st.booleans(),
)

# the sizes of csrc/cuda/published.cuh
PUBLISHED = st.builds(
    Case,
    batch=st.sampled_from([1, 2, 3]),
    heads=st.just(8),
    channels=st.just(32),
    queries=st.sampled_from([1, 2, 5, 16, 17, 40]),
    points=st.just(4),
    shapes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=4, max_size=4).map(tuple),
    form=st.sampled_from(["ready", "points", "boxes"]),
    locations=st.sampled_from(["middle", "inside", "around", "far", "borders", "not finite"]),
    seed=st.integers(0, 2**31),
    transposed=st.booleans(),
)

# the first examples of the lists above are what hypothesis shrinks to
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def draw_locations(case: Case, generator: torch.Generator) -> torch.Tensor:
    """[B, Q, M, L, P, 2] float64 in [0, 1] of the levels, or as outside as the case wants."""
    size = (case.batch, case.queries, case.heads, len(case.shapes), case.points, 2)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    if case.locations == "inside":
        return uniform
    if case.locations == "middle":  # with all four pixels in the map, unless that is small
        return uniform * 0.5 + 0.25
    if case.locations == "around":
        return uniform * 2 - 0.5
    if case.locations == "far":
        return (uniform - 0.5) * 10.0 ** torch.randint(1, 30, size, generator=generator)
    if case.locations == "borders":  # multiples of half a pixel: edges, centres, and just outside
        wh = torch.tensor([[w, h] for h, w in case.shapes], dtype=torch.float64)[:, None].clamp(min=1)
        return (uniform * (2 * wh + 4)).floor().sub(2) / (2 * wh)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.4, 0.7], dtype=torch.float64)
    return special[torch.randint(len(special), size, generator=generator)]


def make_inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """value, then locations and weights or reference points, offsets and logits; in the types a
    layer gives them.
    """
    generator = torch.Generator().manual_seed(case.seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = sum(h * w for h, w in case.shapes)
    value = torch.randn(
        case.batch, tokens, case.heads, case.channels, generator=generator, dtype=torch.float64
    )
    locations = draw_locations(case, generator)
    weights = torch.randn(locations.shape[:-1], generator=generator, dtype=torch.float64)
    if case.form == "ready":
        tensors = [value.to(dtype), locations.to(wide), weights.softmax(-1).to(wide)]
    else:
        coordinates = 2 if case.form == "points" else 4
        size = (case.batch, case.queries, len(case.shapes), coordinates)
        around = torch.rand(size, generator=generator, dtype=torch.float64)
        raw = wide if case.seed % 2 else dtype
        tensors = [value.to(dtype), around.to(wide), (8 * locations - 4).to(raw), weights.to(raw)]
    if case.transposed:
        tensors = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    return tensors


def run(case: Case, tensors: list[torch.Tensor], backend: str) -> torch.Tensor:
    function = ms_deform_attn if case.form == "ready" else ms_deform_attn_fused
    return function(tensors[0], case.shapes, *tensors[1:], backend=backend)


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Output and gradients of a backend against the reference in float64."""
    tensors = make_inputs(case, dtype)
    # in a detector most reference points need no gradient, and kernels take a shorter way
    needed = [case.form == "ready" or case.seed % 3 == 0 or i != 1 for i in range(len(tensors))]
    exact = [tensor.double().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    wanted = run(case, exact, "reference")
    grad = torch.randn(
        wanted.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64
    ).to(dtype)
    wanted_grads = torch.autograd.grad(wanted, leaves_of(exact), grad.double())

    given = [tensor.to(device).requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    out = run(case, given, backend)
    grads = torch.autograd.grad(out, leaves_of(given), grad.to(device))

    assert out.dtype == dtype
    compare("output", out, wanted, BOUNDS[dtype])
    names = (
        ["value", "locations", "weights"]
        if case.form == "ready"
        else ["value", "reference", "offsets", "logits"]
    )
    names = [name for name, need in zip(names, needed, strict=True) if need]
    for name, tensor, seen, expected in zip(names, leaves_of(given), grads, wanted_grads, strict=True):
        assert seen.dtype == tensor.dtype
        assert seen.shape == tensor.shape
        if name in ("locations", "offsets", "reference") and (
            case.locations == "borders" or dtype != torch.float64
        ):
            # on a pixel's centre the slope depends on the side, and rounding chooses one
            seen, expected = away_from_centres(case, exact, name, seen, expected)
        compare(f"gradient of {name}", seen, expected, 20 * BOUNDS[dtype])


def leaves_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def away_from_centres(
    case: Case, exact: list[torch.Tensor], name: str, *grads: torch.Tensor
) -> list[torch.Tensor]:
    locations = exact[1] if case.form == "ready" else reference.locate(case.shapes, *exact[1:3])
    pixels = locations * torch.tensor([[w, h] for h, w in case.shapes], dtype=torch.float64)[:, None] - 0.5
    near = ((pixels - pixels.round()).abs() < 0.02).any(-1, keepdim=True)  # [B, Q, M, L, P, 1]
    if name == "reference":
        near = near.any(4).any(2)
    return [grad.cpu().double().masked_fill(near, 0) for grad in grads]


def compare(what: str, seen: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    seen, wanted = seen.detach().cpu().double(), wanted.detach()
    scale = 1 + (wanted.nan_to_num(0, 0, 0).abs().max().item() if wanted.numel() else 0)
    torch.testing.assert_close(
        seen, wanted, atol=bound * scale, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


needs_build = pytest.mark.skipif(missing("compiled", "cpu") is not None, reason=str(compiled.missing("cpu")))


@needs_build
@pytest.mark.parametrize("instructions", CPU_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_compiled_on_cpu(dtype, instructions, monkeypatch):
    monkeypatch.setenv("MS_DEFORM_ATTN_ISA", instructions)

    @PROPERTY
    @given(CASES)
    def holds(case):
        check(case, dtype, "compiled")

    holds()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@PROPERTY
@given(CASES)
def test_reference(dtype, case):
    check(case, dtype, "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["compiled", "triton", "reference"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@PROPERTY
@given(st.one_of(CASES, PUBLISHED))
def test_on_gpu(dtype, backend, case):
    check(case, dtype, backend, "cuda")


LARGE = (
    Case(1, 8, 32, 2000, 4, ((100, 167), (50, 84), (25, 42), (13, 21)), "points", "around", 0, False),
    Case(2, 3, 1025, 7, 3, ((6, 9), (3, 4), (0, 5), (1, 1)), "ready", "around", 0, False),
)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_build), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("case", LARGE, ids=["queries", "channels"])
def test_compiled_on_large_shapes(case, device):
    check(case, torch.float32, "compiled", device)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_build), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_that_are_not_finite_stay_where_they_are(dtype, published, device):
    """A pixel of NaN shows in the samples that touch it and in no other; a weight of NaN shows
    wherever its sample lies.
    """
    heads, channels, points = (8, 32, 4) if published else (2, 33, 3)
    shapes = [(8, 9), (7, 7), (6, 7), (6, 6)] if published else [(4, 5), (2, 3)]
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, tokens, heads, channels, generator=generator).to(dtype)
    locations = torch.rand(2, 40, heads, levels, points, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(2, 40, heads, levels, points, generator=generator)
    value[0, 7, 1, :] = math.nan
    value[1, 0, 0, 5] = math.nan
    weights[1, 3, 1, 0, 2] = math.nan
    weights[1, 4, 0, 1, 0] = math.inf
    locations[1, 3, 1, 0, 2] = 5.0
    wanted = reference.forward(value.double(), shapes, locations.double(), weights.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = [tensor.to(device) for tensor in (value, locations.to(wide), weights.to(wide))]
    out = ms_deform_attn(given[0], shapes, *given[1:], backend="compiled")
    assert torch.equal(out.isnan().cpu(), wanted.isnan())
    assert 0 < wanted.isnan().sum() < wanted.numel() / 4


@needs_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype):
    case = Case(2, 3, 32, 333, 4, ((20, 30), (10, 15), (5, 8)), "points", "around", 5, False)
    tensors = [tensor.requires_grad_() for tensor in make_inputs(case, dtype)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = run(case, tensors, "compiled")
            results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_build
def test_conversions_are_exact():
    """Every float16 and bfloat16 passes through a kernel unchanged, and float32 sums round as
    PyTorch rounds.
    """
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        value = torch.zeros(1, 9, 64, 1024, dtype=dtype)
        value[0, 4] = every.view(64, 1024)  # the middle of nine pixels, looked at in its centre
        locations, weights = torch.full((1, 1, 64, 1, 1, 2), 0.5), torch.ones(1, 1, 64, 1, 1)
        for factor in (1.0, 1 / 3):
            out = ms_deform_attn(value, [(3, 3)], locations, weights * factor, backend="compiled").view(-1)
            torch.testing.assert_close(
                out, (every.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True
            )
