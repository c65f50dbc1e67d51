"""Choice of the implementation of multi-scale deformable attention.

The order is: compiled kernels, Triton on CUDA, plain PyTorch.

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
    name = asked or "auto"
    if name == "auto":
        name = os.environ.get(VARIABLE) or "auto"
    # what a device has does not change; a graph that is recorded must not be disturbed
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
    if name != "auto":
        if reason := missing(name, device_type):
            raise RuntimeError(
                f"multi-scale deformable attention on {device_type} can't use {name}: {reason}"
            )
        log.info("multi-scale deformable attention on %s: %s (asked for)", device_type, name)
        return name, _module(name)

    # the best that there is; the log says why nothing better
    because = ""
    for candidate in NAMES:
        # on a CPU nobody expects Triton
        if candidate == "triton" and device_type != "cuda":
            continue
        reason = missing(candidate, device_type)
        if reason is None:
            break
        because += f"; not {candidate}: {reason}"
    log.info("multi-scale deformable attention on %s: %s%s", device_type, candidate, because)
    return candidate, _module(candidate)


def missing(name: str, device_type: str) -> str | None:
    """Why a backend can't serve a device; None if it can."""
    if name == "compiled":
        return compiled.missing(device_type)
    if name == "triton":
        if device_type != "cuda":
            return f"no kernels for {device_type}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
    return None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded. Then nothing can be compared; its warm-up has done so."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _verify(backend: str, device: torch.device) -> None:
    """Compare outputs and gradients of both operators with the reference's on a tiny input."""
    module = _module(backend)
    for seen, wanted in zip(_probe(module, device), _probe(reference, torch.device("cpu")), strict=True):
        # a kernel that did nothing leaves zeros or old memory: both are far from these
        if not torch.allclose(seen.cpu().double(), wanted, rtol=1e-3, atol=1e-4):
            raise RuntimeError(_verdict(backend, device, "computes wrong numbers there"))


def _probe(module: ModuleType, device: torch.device) -> list[Tensor]:
    """All outputs and gradients of a backend, for two layers: any one, and the published.

    CUDA has kernels of its own for the latter.
    """
    try:
        small = _probe_layer(module, device, heads=2, shapes=[(4, 6), (2, 3)])
        return small + _probe_layer(module, device, heads=8, shapes=[(9, 8), (7, 7), (6, 8), (6, 6)])
    except Exception as error:
        backend = module.__name__.split(".")[-1]
        raise RuntimeError(_verdict(backend, device, f"fails there: {error}")) from error


def _probe_layer(
    module: ModuleType, device: torch.device, heads: int, shapes: list[tuple[int, int]]
) -> list[Tensor]:
    type_ = torch.float64 if module is reference else torch.float32
    generator = torch.Generator().manual_seed(0)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    channels, queries, points = 32, 5, 4

    # the same numbers on every device
    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64).to(device, type_)

    value = random(1, tokens, heads, channels)
    grad = random(1, queries, heads * channels)
    # points inside, on the border and outside; those of the first heads in the middle
    locations = random(1, queries, heads, levels, points, 2) * 1.4 - 0.2
    locations[:, :, : heads // 2] = locations[:, :, : heads // 2] * 0.2 + 0.4
    weights = random(1, queries, heads, levels, points)
    reference_points = random(1, queries, levels, 2) * 0.2 + 0.4

    # both operators; the fused one gets numbers that lead to similar locations
    ready = (value, shapes, locations, weights)
    raw = (value, shapes, reference_points, 8 * locations - 4, 4 * weights)
    outputs = [module.forward(*ready), module.fused_forward(*raw)]
    gradients = [*module.backward(grad, *ready), *module.fused_backward(grad, *raw)]
    # without the gradient of the reference points
    return outputs + gradients + list(module.fused_backward(grad, *raw, needs_reference=False))


def _verdict(backend: str, device: torch.device, what: str) -> str:
    """What is wrong with a backend on a device, and what to do."""
    where = str(device)
    remedy = ". You can"
    # kernels that were built for other GPUs are the usual cause
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
