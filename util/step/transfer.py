"""The only ways between host and device inside a step, so that waits can be found and counted.

`to_host` waits for the device. `to_device` and `HostCopy` do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copies on the host, all in one transfer that waits for the device; the tensors share a dtype."""
    if not tensors:
        return []
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; through pinned memory for CUDA, so that nobody waits."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A device tensor on its way to the host: started now, read later, when it has long arrived."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        if tensor.device.type != "cuda":
            self._host = tensor.detach().to("cpu", copy=True)
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        # without an argument it would be recorded on a stream of the current device, which may be
        # another one
        self._event.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """The host tensor; waits only if the copy has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
