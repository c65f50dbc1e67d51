"""The linear layer for many tokens against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.ops import linear
from models.ops.linear import MANY, TokenLinear


@pytest.mark.parametrize(
    "size", [(2, MANY, 24), (MANY + 3, 24), (3, 5, 24), (1, 2, MANY, 24), (0, 7, 24), (24,)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("amd", [True, False])
def test_it_is_a_linear_layer(size, dtype, bias, amd, monkeypatch):
    monkeypatch.setattr(linear, "on_amd", lambda: amd)
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias, dtype=dtype)
    ours = TokenLinear(24, 40, bias=bias, dtype=dtype)
    assert ours.load_state_dict(plain.state_dict()).missing_keys == []
    tokens = torch.randn(size, dtype=dtype).requires_grad_()
    outs = [layer(tokens) for layer in (plain, ours)]
    assert outs[1].is_contiguous()
    grad = torch.randn_like(outs[0])
    both = zip(outs, (plain, ours), strict=True)
    grads = [torch.autograd.grad(out, [tokens, *layer.parameters()], grad) for out, layer in both]
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(outs[1], outs[0], atol=bound, rtol=bound)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), outs[0], atol=bound, rtol=bound)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, one, atol=40 * bound, rtol=bound)


@torch.no_grad()
def test_transposed_tokens_and_autocast(monkeypatch):
    monkeypatch.setattr(linear, "on_amd", lambda: True)
    layer, plain = TokenLinear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    tokens = torch.randn(24, MANY).t()
    torch.testing.assert_close(layer(tokens), plain(tokens), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(tokens), plain(tokens))
