"""The CUDA kernels' own code, run by the CPU lane by lane: against the reference, on machines
without a GPU.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.cuda_emulation import cases
from tests.cuda_emulation.cases import POWERS_OF_TWO, PUBLISHED, Case
from tests.cuda_emulation.ops import TYPES, EmulatedOps, accumulator, build
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to compile the CUDA kernels for the CPU"
)

NAN, INF = float("nan"), float("inf")
# of the largest expected element; the 16-bit types round once, at the end
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}

CHANNELS = [1, 3, 8, 16, 30, 32, 33, 64, 71, 128, 1025]
SIZES = [
    Case(shapes=[(3, 4)], points=1),
    Case(shapes=[(3, 4)], points=5, channels=32),
    Case(shapes=[(9, 9), (4, 5)], points=8, channels=32, heads=8, queries=2),
    Case(shapes=[(6, 5), (3, 3), (2, 2), (1, 1)], points=4, channels=32, heads=8, queries=5, batch=1),
    Case(shapes=[(2, 3)] * 5, points=8, channels=16, heads=3),
    Case(shapes=[(3, 2)] * 3, points=7, channels=4),
    Case(shapes=[(3, 4), (0, 5), (2, 2), (4, 0)], points=2),
    Case(shapes=[(0, 0)], points=2),
    Case(shapes=[], points=2),
    Case(shapes=[(1, 1)] * 32, points=1),
    Case(points=0),
    Case(queries=1, heads=1, batch=1),
    Case(queries=70, heads=1, batch=3, points=1, channels=4),
    Case(heads=5, channels=6, queries=11),
    Case(shapes=[(40, 30)], queries=40, points=1, channels=2),  # several full tiles of pixels
]


@pytest.fixture(scope="module")
def ops(tmp_path_factory) -> EmulatedOps:
    return EmulatedOps(build(tmp_path_factory.mktemp("emulated")))


def assert_close(got, wanted, dtype) -> None:
    wanted = wanted.detach()
    scale = max(wanted[wanted.isfinite()].abs().max().item(), 1.0) if wanted.isfinite().any() else 1.0
    torch.testing.assert_close(got.double(), wanted, atol=TOLERANCE[dtype] * scale, rtol=0, equal_nan=True)


def check_located(ops, case, grad, value, locations, weights) -> None:
    inputs = [x.double() for x in (locations, weights)]
    out = ops.forward(value, case.shapes, locations, weights)
    assert_close(out, cases.forward(value.double(), case.shapes, *inputs), case.dtype)
    wanted = cases.gradients(cases.forward, grad, value, case.shapes, locations, weights)
    for deterministic in (False, True):
        grads = ops.backward(grad, value, case.shapes, locations, weights, deterministic)
        for ours, theirs in zip(grads, wanted, strict=True):
            assert_close(ours, theirs, case.dtype)


def check_raw(ops, case, coordinates, raw_dtype) -> None:
    grad, value, *raw = case.raw(coordinates, raw_dtype)
    out = ops.fused_forward(value, case.shapes, *raw)
    assert_close(
        out, cases.fused_forward(value.double(), case.shapes, *(x.double() for x in raw)), case.dtype
    )
    wanted = cases.gradients(cases.fused_forward, grad, value, case.shapes, *raw)
    for needs_reference, deterministic in itertools.product((False, True), repeat=2):
        grads = ops.fused_backward(grad, value, case.shapes, *raw, needs_reference, deterministic)
        assert needs_reference or not grads[1].numel()
        for ours, theirs in zip(grads, wanted, strict=True):
            if ours.numel():
                assert_close(ours, theirs, case.dtype)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_channels_and_types(ops, channels, dtype):
    case = (
        Case(channels=channels, dtype=dtype)
        if channels < 1000
        else Case(channels=channels, dtype=dtype, batch=1, queries=2)
    )
    check_located(ops, case, *case.located())
    check_raw(ops, case, 2, dtype)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(ops, case):
    check_located(ops, case, *case.located())
    check_raw(ops, case, 2, case.dtype)


@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_boxes_and_raw_inputs_in_the_type_of_arithmetic(ops, channels, dtype):
    case = Case(channels=channels, dtype=dtype, points=3)
    check_raw(ops, case, 4, dtype)
    check_raw(ops, case, 4, accumulator(dtype))
    check_raw(ops, case, 2, accumulator(dtype))


@pytest.mark.parametrize("inside", ["all", "most", "few"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_published_layer(ops, dtype, inside):
    """Rows of a warp whose samples all have four pixels in the map, and others."""
    case = PUBLISHED.with_type(dtype)
    grad, value, locations, weights = case.located()
    if inside != "few":
        locations = 0.2 + 0.6 * locations.clamp(0, 1)  # all four pixels of the smallest level are there
    if inside == "most":
        locations.view(-1)[::29] = torch.tensor([0.0, -2.0, 0.93, NAN, INF]).repeat(200)[
            : -(-locations.numel() // 29)
        ]
    check_located(ops, case, grad, value, locations, weights)
    check_raw(ops, case, 2, dtype)
    check_raw(ops, case, 4, accumulator(dtype))


@pytest.mark.parametrize("empty", ["batch", "queries", "heads"])
def test_nothing_to_do(ops, empty):
    case = replace(Case(), **{empty: 0})
    grad, value, locations, weights = case.located()
    assert ops.forward(value, case.shapes, locations, weights).numel() == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_borders_and_centres(ops, dtype):
    case = Case(shapes=POWERS_OF_TWO, channels=32, queries=1, heads=1, batch=1, points=81, dtype=dtype)
    grad, value, locations, weights = case.located()
    for level, (height, width) in enumerate(case.shapes):
        x = torch.tensor([-0.5 - 1 / 64, -0.5, 0, 0.5, 1, width / 2, width - 0.5, width, width + 0.5]) / width
        y = (
            torch.tensor([-0.5, -0.5 + 1 / 64, 0, 0.5, 1, height / 2, height - 0.5, height, height + 0.5])
            / height
        )
        locations[0, 0, 0, level] = torch.cartesian_prod(x, y)
    check_located(ops, case, grad, value, locations, weights)


def test_locations_that_are_no_numbers_are_outside(ops):
    case = Case(shapes=POWERS_OF_TWO, channels=32, points=4)
    grad, value, locations, weights = case.located()
    bad = torch.tensor(
        [[NAN, 0.5], [0.5, NAN], [INF, 0.5], [0.5, -INF], [1e38, 0.5], [NAN, NAN], [-1e38, INF], [3e9, 0.1]]
    )
    locations[0, 0, 0] = bad.view(2, 4, 2)
    check_located(ops, case, grad, value, locations, weights)
    for grad_input in ops.backward(grad, value, case.shapes, locations, weights, False)[1:]:
        assert (grad_input[0, 0, 0] == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", [0.5, 4.0], ids=["inside", "outside"])
@pytest.mark.parametrize("case", [Case(channels=32), PUBLISHED], ids=str)
def test_weights_that_are_no_numbers_show(ops, case, bad, where):
    grad, value, locations, weights = case.located()
    weights[0, 0, 0, 0, 0], locations[0, 0, 0, 0, 0] = bad, where
    out = ops.forward(value, case.shapes, locations, weights)
    assert not out[0, 0, :32].isfinite().any()
    assert_close(
        out, cases.forward(value.double(), case.shapes, locations.double(), weights.double()), case.dtype
    )
    wanted = cases.gradients(cases.forward, grad, value, case.shapes, locations, weights)
    for deterministic in (False, True):
        grads = ops.backward(grad, value, case.shapes, locations, weights, deterministic)
        for ours, theirs in zip(
            grads, wanted, strict=True
        ):  # infinity times a sum may be the sum of infinities: NaN
            assert_close(ours.nan_to_num(NAN, NAN, NAN), theirs.nan_to_num(NAN, NAN, NAN), case.dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(shapes=POWERS_OF_TWO, channels=7, points=4),
        Case(shapes=POWERS_OF_TWO, channels=32, points=4),
        replace(PUBLISHED, shapes=[*POWERS_OF_TWO, (1, 1), (3, 3)]),
    ],
    ids=str,
)
def test_pixels_that_are_no_numbers_stay_where_they_are(ops, case):
    """All levels but the first, and image 1, are NaN; nothing samples them, though points lie on the
    very border to them.
    """
    grad, value, locations, weights = case.located()
    height, width = case.shapes[0]
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    locations[:, :, :, 0] = torch.tensor(corners)
    locations[:, :, :, 1:] = -1.0
    locations[1] = -1.0
    value[:, height * width :], value[1] = NAN, NAN
    assert ops.forward(value, case.shapes, locations, weights).isfinite().all()
    for deterministic in (False, True):
        for grad_input in ops.backward(grad, value, case.shapes, locations, weights, deterministic):
            assert grad_input.isfinite().all()


@pytest.mark.parametrize("case", [Case(channels=32), PUBLISHED], ids=str)
def test_gradient_that_is_no_number_keeps_to_what_was_sampled(ops, case):
    grad, value, locations, weights = case.located()
    grad[0, 0], locations[0, 0] = NAN, 4.0
    for deterministic in (False, True):
        for grad_input in ops.backward(grad, value, case.shapes, locations, weights, deterministic):
            assert grad_input.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_sums_of_small_types_are_not_rounded_on_the_way(ops, dtype, deterministic):
    """4000 queries give each pixel 1 / 4096: in bfloat16 itself the sum would stop at 1 / 16."""
    case = Case(shapes=[(1, 1)], points=1, batch=1, heads=1, queries=4000, channels=8, dtype=dtype)
    grad, value, locations, weights = case.located()
    grad.fill_(1 / 4096), locations.fill_(0.5), weights.fill_(1)
    grad_value = ops.backward(grad, value, case.shapes, locations, weights, deterministic)[0]
    torch.testing.assert_close(grad_value, torch.full_like(grad_value, 4000 / 4096), atol=0, rtol=0)


def test_unaligned_arrays_take_the_scalar_path(ops):
    case = Case(channels=32)
    grad, value, locations, weights = case.located()
    shifted = [torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x) for x in (grad, value, locations, weights)]
    check_located(ops, case, *shifted)


@pytest.mark.parametrize("published", [False, True])
def test_offsets_beyond_32_bits(ops, published):
    """The last pixels of 2.2e9 elements; memory that is not touched costs nothing."""
    heads, channels, side = (8, 32, 2936) if published else (2, 32, 5872)
    shapes = [(1, 1)] * 3 + [(side, side)] if published else [(side, side)]
    points = 4 if published else 1
    tokens = side * side + len(shapes) - 1
    assert tokens * heads * channels > 2**31
    memory = mmap.mmap(-1, 2 * tokens * heads * channels, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    value = torch.frombuffer(memory, dtype=torch.float16).view(1, tokens, heads, channels)
    value[0, -1, 1] = torch.arange(channels)
    locations = torch.full((1, 1, heads, len(shapes), points, 2), 1 - 0.5 / side)
    weights = torch.full((1, 1, heads, len(shapes), points), 1 / points)
    out = ops.forward(value, shapes, locations, weights).view(heads, channels)
    torch.testing.assert_close(out[1], torch.arange(channels).half(), atol=0.02, rtol=0)
    assert (out[0] == 0).all()


def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path):
    find = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not os.path.isabs(find.stdout.strip()):
        pytest.skip("g++ has no AddressSanitizer here")
    checks = "-fsanitize=address,undefined,float-cast-overflow"
    library = build(tmp_path, "-O1", "-g1", checks, "-fno-sanitize-recover=all")
    environment = {
        **os.environ,
        "LD_PRELOAD": find.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.cuda_emulation.exercise", str(library)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-4000:]
