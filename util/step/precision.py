"""Mixed precision: products in bfloat16 or float16, and what must stay in float32.

`autocast` goes around the model's forward and nothing else. PyTorch then computes convolutions,
linear layers and attention in the low precision. What places something in an image stays in
float32, because the spacing of bfloat16 numbers just below 1 is 1 / 256, which is 5 pixels of 1333:
reference points, boxes, the heads that give them, valid ratios and position encodings. So do the
sums along the residual branches, the matching and the losses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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


def full_precision(device: torch.device) -> AbstractContextManager:
    """A block without autocast. Its inputs are not cast: see `widened`."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; every other tensor itself."""
    if tensor.dtype in LOW_TYPES.values():
        return tensor.float()
    return tensor
