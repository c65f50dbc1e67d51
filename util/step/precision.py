"""Precision of products: bfloat16, float16 or TF32, and what must stay in float32.

`autocast` goes around the model's forward and nothing else. PyTorch then computes convolutions,
linear layers and attention in the low precision. What places something in an image stays in
float32, because the spacing of bfloat16 numbers just below 1 is 1 / 256, which is 5 pixels of 1333:
reference points, boxes, the heads that give them, valid ratios and position encodings. So do the
sums along the residual branches, the matching and the losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

LOW_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by --amp


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """The block to run a model's forward in.

    Args:
        amp: "off", "bf16" or "fp16". Gradients of float16 need a scaler (torch.amp.GradScaler), or
            they vanish below 6e-8.
        device: where the model is.
    """
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=LOW_TYPES[amp])


# whether float32 products are in TF32, for code that torch.compile can follow
_tf32 = False


def use_float32_matmul(precision: str, device: torch.device) -> None:
    """Let float32 products on an Nvidia GPU use TF32 ("high"), or not ("highest").

    TF32 rounds what is multiplied to 10 bits of mantissa. Convolutions use it in either case, as is
    PyTorch's default.
    """
    global _tf32
    _tf32 = precision == "high" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if _tf32 else "highest")


def full_precision(device: torch.device) -> AbstractContextManager:
    """A block without autocast and, in the forward, without TF32. Its inputs are not cast: see `widened`."""
    without_autocast: AbstractContextManager = nullcontext()
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        without_autocast = torch.autocast(device.type, enabled=False)
    return _without_tf32(without_autocast) if _tf32 else without_autocast


@contextmanager
def _without_tf32(also: AbstractContextManager) -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    try:
        with also:
            yield
    finally:
        torch.set_float32_matmul_precision("high")


def widened(tensor: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; every other tensor itself."""
    if tensor.dtype in LOW_TYPES.values():
        return tensor.float()
    return tensor
