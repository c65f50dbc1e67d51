"""The optimiser's parameter groups, the learning-rate schedule, and all that turns a loss into the
next weights.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from util.config import Config, OptimConfig

log = logging.getLogger(__name__)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (or SGD) over the published groups, fused where the parameters' device has it."""
    optim = config.optim
    groups = parameter_groups(model, optim)
    options = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": _can_fuse(model)}
    if optim.sgd:
        return _with_momentum(torch.optim.SGD(groups, momentum=0.9, **options))
    return torch.optim.AdamW(groups, **options)


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Momentum that begins at zero, which computes the same. The fused optimiser takes new memory
    for it as it comes, and keeps what lay there if the first step is left out.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# of parameter_groups, in its order
GROUPS = ("transformer and heads", "backbone", "slow linear layers")


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Trainable parameters in three groups: all others, the backbone, the slow linear layers (in
    this order).
    """
    others: list[nn.Parameter] = []
    backbone: list[nn.Parameter] = []
    slow: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _names_one_of(name, optim.lr_backbone_names):
            backbone.append(parameter)
        elif _names_one_of(name, optim.lr_linear_proj_names):
            slow.append(parameter)
        else:
            others.append(parameter)
    return [
        {"params": others, "lr": optim.lr},
        {"params": backbone, "lr": optim.lr_backbone},
        {"params": slow, "lr": optim.lr * optim.lr_linear_proj_mult},
    ]


def lr_factor(epoch: int, lr_drop: int, lr_drop_epochs: Sequence[int]) -> float:
    """What the initial learning rates are multiplied by in `epoch` (counted from 0)."""
    drops = sum(epoch >= e for e in lr_drop_epochs) if lr_drop_epochs else epoch // lr_drop
    return 0.1**drops


def build_schedule(optimizer: torch.optim.Optimizer, config: Config) -> LambdaLR:
    """The step decay of the paper: by 10 every `lr_drop` epochs, or after each of `lr_drop_epochs`."""
    drop, epochs = config.optim.lr_drop, config.optim.lr_drop_epochs
    return LambdaLR(optimizer, lambda epoch: lr_factor(epoch, drop, epochs))


def go_to_epoch(schedule: LambdaLR, epoch: int) -> None:
    """Set the rates that `epoch` has, to the bit what stepping there gives."""
    schedule.last_epoch = epoch
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group.update(initial_lr=base, lr=base * factor(epoch))


class AveragedWeights:
    """An exponential moving average of a model's parameters: average = decay * average + (1 -
    decay) * parameter.

    It begins as the weights after the first step. `model` is the averaged model; its buffers are
    the model's as of the last `take_buffers`. (PyTorch's own AveragedModel waits for the device and
    copies every buffer in each step.)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self._decay, self._updates = decay, 0
        trained = [
            (a, p)
            for a, p in zip(self.model.parameters(), model.parameters(), strict=True)
            if p.requires_grad
        ]
        self._averages, self._parameters = [a.detach() for a, _ in trained], [p.detach() for _, p in trained]
        self._source = model
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are."""
        # the first ones as they are
        torch._foreach_lerp_(self._averages, self._parameters, 1 - self._decay if self._updates else 1.0)
        self._updates += 1

    @torch.no_grad()
    def take_buffers(self) -> None:
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
    """From losses to the next weights: scaled gradients, accumulation, clipping, the guarded step,
    averaged weights.

    Args:
        clip_max_norm: 0 does not clip.
        scaler: for gradients in float16.
        averaged: updated with every step.
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
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, total: Tensor, group_size: int) -> Tensor | None:
        """Add a batch's gradients to those of its group of `group_size`; gives their scale, if they
        are scaled.

        A loss that is not finite makes the gradients NaN even where its derivative is finite, so
        that all processes, which share their gradients, leave the step out.
        """
        loss = total / group_size
        if self.scaler:
            loss = self.scaler.scale(loss)
        loss.backward(gradient=torch.where(torch.isfinite(total.detach()), 1.0, torch.nan).to(loss.dtype))
        return self.scaler.scale(torch.ones_like(total.detach())) if self.scaler else None

    def step(self) -> Tensor:
        """Step with the gradients of a group, unless they are not finite; gives their norm, on the
        device.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_max_norm or math.inf)
        step_if_finite(self.optimizer, torch.isfinite(norm))
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad()
        if self.averaged:
            self.averaged.update()
        return norm

    def pending_gradients(self) -> list[Tensor | None]:
        """This process's gradients of an unfinished group, by parameter; an empty list between
        groups.
        """
        gradients = [None if p.grad is None else p.grad.detach().clone() for p in self._parameters]
        return gradients if any(gradient is not None for gradient in gradients) else []

    def load_pending_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=bool(gradients)):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint: optimizer; scaler and ema where there are such."""
        state = {"optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict()} if self.scaler else {}
        return state | ({"ema": self.averaged.state_dict()} if self.averaged else {})

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore these entries. Weight decay and `fused` stay those of this run: the flags and the
        device decide them, and PyTorch places the step counts by `fused`. An entry that the
        checkpoint lacks starts afresh, with a warning.
        """
        own = {name: self.optimizer.defaults[name] for name in ("weight_decay", "fused")}
        saved = checkpoint["optimizer"]
        groups = [{**group, **own} for group in saved["param_groups"]]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})
        for parameter, state in self.optimizer.state.items():  # which it does not look at
            if any(isinstance(x, Tensor) and x.dim() and x.shape != parameter.shape for x in state.values()):
                raise ValueError(f"the state of a parameter of {list(parameter.shape)} has another shape")
        if self.scaler and "scaler" in checkpoint:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.averaged and "ema" in checkpoint:
            self.averaged.load_state_dict(checkpoint["ema"])
        elif self.averaged:
            log.warning("resume: the checkpoint has no averaged weights; the average starts from its weights")
            self.averaged.start_from_model()


def build_updater(model: nn.Module, config: Config) -> Updater:
    """The optimiser with what the flags put around it. The model must lie on its device."""
    device_type = next(model.parameters()).device.type
    return Updater(
        build_optimizer(model, config),
        clip_max_norm=config.optim.clip_max_norm,
        accumulate_steps=config.optim.accumulate_steps,
        scaler=GradScaler(device_type) if config.run.amp == "fp16" else None,
        averaged=AveragedWeights(model, config.optim.ema_decay) if config.optim.ema_decay else None,
    )


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step unless the scalar bool `finite` is False, decided on the device: nobody waits, and no
    weight is spoilt.

    Fused optimisers read the attribute `found_inf`, which is how GradScaler skips a step; others
    are asked here.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        del optimizer.found_inf
    elif bool(finite):
        optimizer.step()


def _names_one_of(name: str, keywords: Sequence[str]) -> bool:
    return any(keyword in name for keyword in keywords)


def _can_fuse(model: nn.Module) -> bool:
    return all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in model.parameters())
