"""From losses to the next weights: scaled gradients, accumulation, clipping, the step, the EMA."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from util.config import Config
from util.optim import GROUPS, build_optimizer

log = logging.getLogger(__name__)


class AveragedWeights:
    """Exponential moving average (EMA) of the parameters.

    average = decay * average + (1 - decay) * parameter. The average starts as the weights after the
    first step. `model` is the averaged model; its buffers are those of the last `take_buffers`.
    PyTorch's AveragedModel is not used: it blocks on the device and copies every buffer in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self._decay, self._updates = decay, 0
        self._source = model
        self._averages: list[Tensor] = []
        self._parameters: list[Tensor] = []
        # Frozen parameters never change.
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            if parameter.requires_grad:
                self._averages.append(average.detach())
                self._parameters.append(parameter.detach())
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average."""
        # The first update copies.
        share = 1 - self._decay
        if self._updates == 0:
            share = 1.0
        torch._foreach_lerp_(self._averages, self._parameters, share)
        self._updates += 1

    @torch.no_grad()
    def take_buffers(self) -> None:
        """Copy the model's buffers (statistics of batch norm) to the averaged model."""
        for average, buffer in zip(self.model.buffers(), self._source.buffers(), strict=True):
            average.copy_(buffer)

    def start_from_model(self) -> None:
        self.model.load_state_dict(self._source.state_dict())

    def state_dict(self) -> dict[str, Any]:
        self.take_buffers()
        return {"model": self.model.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._updates = int(state["updates"])


class Updater:
    """Gradients of losses, and optimiser steps with them.

    Args:
        optimizer: of the trained parameters.
        clip_max_norm: limit of the gradient's norm; 0 does not clip.
        accumulate_steps: batches in a group, whose gradients are averaged before a step.
        scaler: for gradients in float16.
        averaged: EMA of the weights, updated with every step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_max_norm: float,
        accumulate_steps: int = 1,
        scaler: GradScaler | None = None,
        averaged: AveragedWeights | None = None,
    ) -> None:
        self.optimizer, self.scaler, self.averaged = optimizer, scaler, averaged
        self.accumulate_steps = accumulate_steps
        self._clip_max_norm = clip_max_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()

    @property
    def lr(self) -> float:
        """Learning rate of the transformer and the heads."""
        return self.optimizer.param_groups[0]["lr"]

    def rates(self) -> dict[str, float]:
        """Learning rates by the name of their parameter group."""
        groups = self.optimizer.param_groups
        return {name: group["lr"] for name, group in zip(GROUPS, groups, strict=True)}

    def group_of(self, step: int, num_steps: int) -> tuple[int, bool]:
        """Number of batches in the group of `step`, and whether `step` is the last of them.

        The last group of an epoch of `num_steps` batches may be smaller.
        """
        start = step - step % self.accumulate_steps
        size = min(self.accumulate_steps, num_steps - start)
        return size, step == start + size - 1

    def backward(self, total: Tensor, group_size: int) -> Tensor | None:
        """Add the gradients of a batch to those of its group.

        Args:
            total: loss of the batch, a scalar.
            group_size: number of batches in the group.

        Returns:
            the scale of the gradients, a scalar on the device; None without a scaler.
        """
        loss = total / group_size
        scale = None
        if self.scaler:
            loss = self.scaler.scale(loss)
            scale = self.scaler.scale(torch.ones_like(total.detach()))
        # An infinite loss can have finite gradients. Make them NaN then: after the exchange every
        # process has NaN and skips the step.
        finite = torch.isfinite(total.detach())
        loss.backward(gradient=torch.where(finite, 1.0, torch.nan).to(loss.dtype))
        return scale

    def step(self) -> Tensor:
        """Step with the gradients of a group if they are finite.

        Returns:
            the norm of the gradient before clipping, a scalar on the device.
        """
        # Clipping compares true norms.
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_max_norm or math.inf)
        step_if_finite(self.optimizer, torch.isfinite(norm))
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        # Also after a skipped step, in which the weights did not change.
        if self.averaged:
            self.averaged.update()
        return norm

    def pending_gradients(self) -> list[Tensor | None]:
        """Gradients of this process for an unfinished group, by parameter; [] between groups."""
        # zero_grad sets gradients to None after a step.
        if all(parameter.grad is None for parameter in self._parameters):
            return []
        return [None if p.grad is None else p.grad.detach().clone() for p in self._parameters]

    def load_pending_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=bool(gradients)):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint: `optimizer`, and `scaler` and `ema` if the run has them."""
        state = {"optimizer": self.optimizer.state_dict()}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.averaged:
            state["ema"] = self.averaged.state_dict()
        return state

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the entries of `state_dict`. Averages that it does not have start from the weights.

        Raises ValueError if the optimiser's state is of other parameters.
        """
        # Weight decay and `fused` stay those of this run: flags and device decide them, and
        # PyTorch places the step counts by `fused`.
        own = {name: self.optimizer.defaults[name] for name in ("weight_decay", "fused")}
        saved = checkpoint["optimizer"]
        groups = [{**group, **own} for group in saved["param_groups"]]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})

        # PyTorch does not compare shapes.
        for parameter, state in self.optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    shape = list(parameter.shape)
                    raise ValueError(f"the state of a parameter of {shape} has another shape")

        # A run may switch mixed precision or averages on when it resumes.
        if self.scaler and "scaler" in checkpoint:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.averaged and "ema" in checkpoint:
            self.averaged.load_state_dict(checkpoint["ema"])
        elif self.averaged:
            log.warning("resume: the checkpoint has no averaged weights; the average starts from its weights")
            self.averaged.start_from_model()


def build_updater(model: nn.Module, config: Config) -> Updater:
    """Optimiser, gradient scaler and EMA as the flags say. The model must be on its device."""
    scaler = None
    if config.run.amp == "fp16":
        scaler = GradScaler(next(model.parameters()).device.type)
    averaged = None
    if config.optim.ema_decay:
        averaged = AveragedWeights(model, config.optim.ema_decay)
    return Updater(
        build_optimizer(model, config),
        clip_max_norm=config.optim.clip_max_norm,
        accumulate_steps=config.optim.accumulate_steps,
        scaler=scaler,
        averaged=averaged,
    )


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Call `optimizer.step()` only if the scalar bool `finite` is True; if False, the weights do not change.

    With a fused optimiser the decision stays on the device (no synchronisation).
    """
    if optimizer.defaults.get("fused"):
        # GradScaler skips steps by the same attribute.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(finite):
        optimizer.step()
