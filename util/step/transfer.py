"""The copies between host and device inside a step, in one place so that they can be counted.

Only the numbers of a log line are copied elsewhere (metrics.py).

`to_host` synchronises with the device. `to_device` and `HostCopy` do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copies of tensors of one dtype on the host, in one transfer that synchronises."""
    if not tensors:
        return []
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    copies = flat.split([tensor.numel() for tensor in tensors])
    return [copy.view(tensor.shape) for copy, tensor in zip(copies, tensors, strict=True)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, for CUDA through pinned memory, which needs no synchronisation."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Asynchronous copy of a device tensor to the host.

    The constructor starts it; `get()` returns the host tensor and blocks only if the copy has not
    finished.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        if tensor.device.type != "cuda":
            self._host = tensor.detach().to("cpu", copy=True)
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        # without an argument it would be recorded on the current device, which may be another
        self._event.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """The host tensor."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
