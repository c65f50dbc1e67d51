"""The values' gradient in a fixed order, against the reference's."""

from __future__ import annotations

import math

import pytest
import torch

from models.ops import deterministic, reference

SHAPES = [(6, 4), (0, 3), (3, 2)]


def inputs(dtype=torch.float64, accumulator=torch.float64, queries=7):
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, 30, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
    locations = torch.rand(2, queries, 3, 3, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(2, queries, 3, 3, 2, generator=generator, dtype=torch.float64)
    grad = torch.randn(2, queries, 15, generator=generator, dtype=torch.float64).to(dtype)
    return grad, value, SHAPES, locations.to(accumulator), weights.to(accumulator)


def wanted(grad, value, shapes, locations, weights):
    kept = [i for i, (h, w) in enumerate(shapes) if h * w]
    parts = locations[:, :, :, kept].double(), weights[:, :, :, kept].double()
    return reference.backward(grad.double(), value.double(), [shapes[i] for i in kept], *parts)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [0, 1, 7])
def test_it_is_the_gradient_of_the_reference(dtype, queries):
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    args = inputs(dtype, accumulator, queries)
    got = deterministic.value_gradient(*args)
    assert got.dtype == dtype
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 100 * torch.finfo(accumulator).eps}
    torch.testing.assert_close(got.double(), wanted(*args), **tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_locations_that_are_no_numbers_give_nothing(bad):
    grad, value, shapes, locations, weights = inputs()
    far, none = locations.clone(), weights.clone()
    far[0, 2, 1, 0, 1, 0] = bad
    none[0, 2, 1, 0, 1] = 0
    got = deterministic.value_gradient(grad, value, shapes, far, weights)
    torch.testing.assert_close(
        got, deterministic.value_gradient(grad, value, shapes, locations, none), rtol=0, atol=1e-14
    )
    weights[0, 2, 1, 0, 1] = math.nan
    assert torch.equal(deterministic.value_gradient(grad, value, shapes, far, weights), got)


def test_corners_outside_the_map_touch_no_pixel():
    """An infinite gradient shows in the pixels around its sample, and in no other."""
    grad, value, shapes, locations, weights = inputs(queries=1)
    locations[:], weights[:, :, :, 1:] = 5.0, 0
    locations[0, 0, 0, 0, 0] = torch.tensor([0.0, 0.5])  # x = -0.5, y = 2.5 of 6 x 4
    grad[0, 0, :5] = math.inf
    touched = deterministic.value_gradient(grad, value, shapes, locations, weights)
    assert touched[0, :, 0].isinf().any(-1).nonzero().flatten().tolist() == [2 * 4, 3 * 4]
    assert touched[0, :, 1:].count_nonzero() == touched[1].count_nonzero() == 0
    assert touched.isfinite().sum() == touched.numel() - 2 * 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_the_same_every_time(device):
    """Many samples in few pixels, so that another order would show."""
    generator = torch.Generator().manual_seed(2)
    locations, weights = (
        torch.rand(1, 5000, 1, 1, 2, 2, generator=generator),
        torch.rand(1, 5000, 1, 1, 2, generator=generator),
    )
    value, grad = torch.zeros(1, 6, 1, 8), torch.randn(1, 5000, 8, generator=generator)
    args = [x.to(device) for x in (grad, value, locations, weights)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (deterministic.value_gradient(*args[:2], [(3, 2)], *args[2:]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
