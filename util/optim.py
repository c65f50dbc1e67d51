"""The optimiser, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from util.config import Config, OptimConfig


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (or SGD with momentum 0.9) over the published groups, fused where the device allows it."""
    optim = config.optim
    groups = parameter_groups(model, optim)
    fused = _can_fuse(model)
    if not optim.sgd:
        return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)

    sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=0.9, weight_decay=optim.weight_decay, fused=fused)
    # Momentum that starts at zero computes the same. The fused optimiser allocates it without
    # setting it, and a first step that is left out would keep whatever the memory held.
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


# Names of parameter_groups, in its order.
GROUPS = ("transformer and heads", "backbone", "slow linear layers")


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Trainable parameters in the groups of GROUPS, each with its learning rate.

    A parameter belongs to the backbone or to the slow layers if its name contains one of
    --lr_backbone_names or --lr_linear_proj_names.
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
    """Factor on the initial learning rates in `epoch` (counted from 0)."""
    drops = epoch // lr_drop
    if lr_drop_epochs:
        drops = sum(epoch >= drop for drop in lr_drop_epochs)
    return 0.1**drops


def build_schedule(optimizer: torch.optim.Optimizer, config: Config) -> LambdaLR:
    """The step decay of the paper: by 10 every `lr_drop` epochs, or after each of `lr_drop_epochs`."""
    drop, epochs = config.optim.lr_drop, config.optim.lr_drop_epochs
    return LambdaLR(optimizer, lambda epoch: lr_factor(epoch, drop, epochs))


def go_to_epoch(schedule: LambdaLR, epoch: int) -> None:
    """Set the learning rates of `epoch`, equal to the bit to those of stepping there."""
    schedule.last_epoch = epoch
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group.update(initial_lr=base, lr=base * factor(epoch))


def _names_one_of(name: str, keywords: Sequence[str]) -> bool:
    return any(keyword in name for keyword in keywords)


def _can_fuse(model: nn.Module) -> bool:
    return all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in model.parameters())
