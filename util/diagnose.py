"""Finding out where a number went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite_module(model: nn.Module, loss_of_model: Callable[[], Tensor]) -> str:
    """Run a step again and name the first module with an output, or gradient of an output, that is not finite.

    Args:
        model: its modules are watched; its gradients are lost.
        loss_of_model: runs the model and gives the total loss.
    """
    # an offending module's container is offended too; the innermost reports first
    forward: list[str] = []
    backward: list[str] = []
    with _watched(model, forward, backward):
        model.zero_grad(set_to_none=True)
        loss = loss_of_model()
        if forward:
            return f"{forward[0]} (forward)"
        if not torch.isfinite(loss):
            return "the losses (every module's output was finite)"
        loss.backward()
    model.zero_grad(set_to_none=True)
    if backward:
        return f"{backward[0]} (gradient of its output)"
    return "no module: the step is finite when it is run again"


@contextmanager
def _watched(model: nn.Module, forward: list[str], backward: list[str]) -> Iterator[None]:
    def hook_for(name: str) -> Callable:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not torch.isfinite(tensor).all():
                    forward.append(name)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: None if torch.isfinite(gradient).all() else backward.append(name))

        return watch

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "tokens"):
        yield value.tokens
