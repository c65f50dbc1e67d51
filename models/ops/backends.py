"""Which implementation of multi-scale deformable attention runs: compiled, else Triton on CUDA,
else plain PyTorch.

An argument of the call or the environment variable MS_DEFORM_ATTN_BACKEND overrides that. What is
chosen, and why nothing better, is logged once for each device. A compiled or Triton backend is
compared with the reference on a tiny input before its first use on a device; if they differ,
nothing goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import compiled, reference

log = logging.getLogger(__name__)

# the best first
_MODULES = {"compiled": "compiled", "triton": "triton_backend", "reference": "reference"}
NAMES = tuple(_MODULES)
VARIABLE = "MS_DEFORM_ATTN_BACKEND"


def choose(asked: str | None, device: torch.device) -> ModuleType:
    """The module whose forward, backward, fused_forward and fused_backward serve tensors on
    `device`.

    Args:
        asked: one of NAMES, or None or "auto" for what the environment says, or else the best there
            is.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for is not to be had on the device, or computes wrong
        numbers there.
    """
    name = asked if asked not in (None, "", "auto") else os.environ.get(VARIABLE) or "auto"
    backend, module = _choose(name, device.type)
    if backend != "reference" and not _capturing(device):
        _verify(backend, device)
    return module


@cache
def _choose(name: str, device_type: str) -> tuple[str, ModuleType]:
    if name not in (*NAMES, "auto"):
        raise ValueError(
            f"no backend of multi-scale deformable attention is called {name!r}: take one of "
            f"{', '.join(NAMES)}"
        )
    reasons = []
    candidates = (
        [one for one in NAMES if one != "triton" or device_type == "cuda"] if name == "auto" else [name]
    )
    for candidate in candidates:
        reason = missing(candidate, device_type)
        if reason is None:
            because = (
                f"; not {'; not '.join(reasons)}" if reasons else " (asked for)" if name != "auto" else ""
            )
            log.info("multi-scale deformable attention on %s: %s%s", device_type, candidate, because)
            return candidate, _module(candidate)
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError(f"multi-scale deformable attention on {device_type} can't use {reasons[0]}")


def missing(name: str, device_type: str) -> str | None:
    """Why a backend can't serve a device; None if it can."""
    if name == "compiled":
        return compiled.missing(device_type)
    return _missing_triton(device_type) if name == "triton" else None


def _missing_triton(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"no kernels for {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _capturing(device: torch.device) -> bool:
    """In the middle of recording a CUDA graph nothing can be compared; the warm-up before it has
    done so.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _verify(backend: str, device: torch.device) -> None:
    """Compare a backend's outputs and gradients with the reference's, of both operators, on a tiny
    input.
    """
    module = _module(backend)
    for seen, wanted in zip(_probe(module, device), _probe(reference, torch.device("cpu")), strict=True):
        # a kernel that did nothing leaves zeros or old memory: both are far from these
        if not torch.allclose(seen.cpu().double(), wanted, rtol=1e-3, atol=1e-4):
            raise RuntimeError(_verdict(backend, device, "computes wrong numbers there"))


def _probe(module: ModuleType, device: torch.device) -> list[Tensor]:
    """All outputs and gradients of a backend on two levels with points inside, on the border and
    outside.
    """
    type_ = torch.float64 if module is reference else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes, (heads, channels, queries, points) = [(4, 6), (2, 3)], (2, 32, 5, 4)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64).to(device, type_)

    value, grad = random(1, 30, heads, channels), random(1, queries, heads * channels)
    locations = random(1, queries, heads, 2, points, 2) * 1.4 - 0.2
    weights, points_of_reference = random(1, queries, heads, 2, points), random(1, queries, 2, 2)
    ready, raw = (
        (value, shapes, locations, weights),
        (value, shapes, points_of_reference, 8 * locations - 4, 4 * weights),
    )
    forwards, backwards = (module.forward, module.fused_forward), (module.backward, module.fused_backward)
    try:
        outputs = [run(*given) for run, given in zip(forwards, (ready, raw), strict=True)]
        return outputs + [
            one for run, given in zip(backwards, (ready, raw), strict=True) for one in run(grad, *given)
        ]
    except Exception as error:
        raise RuntimeError(
            _verdict(module.__name__.split(".")[-1], device, f"fails there: {error}")
        ) from error


def _verdict(backend: str, device: torch.device, what: str) -> str:
    """What is wrong with a backend on a device, and what to do."""
    where, remedy = str(device), ". You can"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where += f" ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"
    if backend == "compiled":
        built_for = compiled.build_record(device.type).get("architectures", f"{device.type} in general")
        remedy = (
            f"; it was built for {built_for}. Build it again for this machine ({compiled.HOW_TO_BUILD}), or"
        )
    return (
        f"multi-scale deformable attention on {where}: {backend} {what}{remedy} do without it: "
        f"{VARIABLE}=reference"
    )
