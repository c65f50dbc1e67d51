"""A linear layer for the tokens of whole images."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 1000  # tokens from which on it pays


@cache
def on_amd() -> bool:
    """Whether the processor is one of AMD, as far as Linux says."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class TokenLinear(nn.Linear):
    """nn.Linear for many tokens: the same parameters, and in evaluation the same results up to
    rounding.

    On a CPU, PyTorch computes products in float32 with MKL, which takes twice the time needed on
    processors of AMD. A 1x1 convolution over the same memory is the same product, and PyTorch
    computes it with oneDNN. On processors of Intel this takes longer than MKL (docs/ops.md has
    measurements).
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not self._pays(tokens):
            return super().forward(tokens)
        # one image of all tokens, in the "channels last" order already: nothing is copied
        image_1CN1 = tokens.reshape(1, -1, 1, tokens.shape[-1]).permute(0, 3, 1, 2)
        product_1CN1 = F.conv2d(image_1CN1, self.weight[:, :, None, None], self.bias)
        return product_1CN1.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], -1)

    def _pays(self, tokens: Tensor) -> bool:
        if torch.compiler.is_compiling():  # which chooses for itself
            return False
        # with its backward it takes longer for large images
        if torch.is_grad_enabled() or not on_amd():
            return False
        in_float32_on_cpu = tokens.device.type == "cpu" and tokens.dtype == self.weight.dtype == torch.float32
        if (
            not in_float32_on_cpu
            or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.is_available()
        ):
            return False
        return tokens.numel() >= MANY * tokens.shape[-1]
