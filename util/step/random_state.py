"""The global random generators of a process, as plain data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomGenerators:
    """PyTorch's generators on the host and on `device`, Python's and NumPy's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        # NumPy's global generator: code of others may use it
        name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        numpy_state = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
        return {**torch_state(self._device), "python": random.getstate(), "numpy": numpy_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        set_torch_state(state, self._device)
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """Seed the global generators of PyTorch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from it


def torch_state(device: torch.device) -> dict[str, Tensor]:
    """PyTorch's generators, which dropout uses. This does not synchronise with the device."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_torch_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore `torch_state`. Without a GPU only the host's generator is set."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
