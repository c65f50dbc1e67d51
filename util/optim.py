"""The optimiser's parameter groups, the learning-rate schedule and the guarded step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from util.config import Config, OptimConfig


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (or SGD) over the published groups, fused where the parameters' device has it."""
    optim = config.optim
    groups = parameter_groups(model, optim)
    options = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": _can_fuse(model)}
    if optim.sgd:
        return torch.optim.SGD(groups, momentum=0.9, **options)
    return torch.optim.AdamW(groups, **options)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Trainable parameters in three groups: all others, the backbone, the slow linear layers (in this order)."""
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
    for group, base, factor in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group.update(initial_lr=base, lr=base * factor(epoch))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm` (0: leave them); gives the norm before, on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step unless the scalar bool `finite` is False, decided on the device: nobody waits, and no weight is spoilt.

    Fused optimisers read the attribute `found_inf`, which is how GradScaler skips a step; others are asked here.
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
