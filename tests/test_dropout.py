"""Dropout by bits against what dropout is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.dropout import Dropout, ReLUDropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.37])
def test_numbers_are_dropped_as_often_as_asked_for_and_the_rest_is_scaled(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(3, 211, 331, dtype=dtype, requires_grad=True)
    out = Dropout(p)(x)
    kept = out != 0
    # five standard deviations of the share
    share = kept.double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    # the gradient goes the same way
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(found, grad * out)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).double() - 0.5
    # the four numbers of a draw too; each mean of 400,000 products is within 5 deviations of 0
    for distance in (1, 2, 3, 4, 8):
        product = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert abs(product) < 5 * 0.25 / 400_000**0.5


def test_the_seed_decides_and_the_edges_are_those_of_pytorch():
    x = torch.randn(7, 13)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(Dropout(0.3)(x))
    assert torch.equal(*outs)
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.3)(x[:0]).shape == (0, 13)
    transposed = Dropout(0.3)(x.t())
    assert transposed.shape == (13, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_relu_and_dropout_together_are_the_one_after_the_other(p, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 7, dtype=dtype, generator=generator).requires_grad_()
    grad = torch.randn(3, 50, 7, dtype=dtype, generator=generator)
    outs, grads, counts = [], [], []
    for function in (ReLUDropout(p), lambda x: Dropout(p)(F.relu(x))):
        torch.manual_seed(3)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            outs.append(function(x))
        grads += torch.autograd.grad(outs[-1], x, grad)
        counts.append(len(kept))
    assert torch.equal(*outs)
    assert torch.equal(*grads)
    assert counts[0] == 1
    torch.testing.assert_close(ReLUDropout(p).eval()(x), F.relu(x), rtol=0, atol=0)
