"""The heads that turn a query into class logits and a box."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.step.precision import full_precision

# of a foreground class at the start (focal loss, arXiv 1708.02002, section 4.1)
PRIOR_PROBABILITY = 0.01


class ClassHead(nn.Linear):
    """A linear layer in the type of its weights, under autocast too: bfloat16 would make ties of
    most logits.
    """

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return super().forward(x.to(self.weight.dtype))


class MLP(nn.Module):
    """Linear layers with ReLU between them, in the type of their weights, under autocast too: a
    box's logits in bfloat16 are pixels off.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            x = x.to(self.layers[0].weight.dtype)
            for layer in self.layers[:-1]:
                x = F.relu(layer(x))
            return self.layers[-1](x)


def build_heads(
    hidden_dim: int, num_classes: int, num_layers: int, with_box_refine: bool, two_stage: bool
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Class and box heads, one entry per decoder layer and, in two-stage, one more for the
    encoder's proposals.

    With box refinement every entry has its own weights, otherwise all are the same module.
    """
    count = num_layers + two_stage
    class_head = ClassHead(hidden_dim, num_classes)
    nn.init.constant_(class_head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    box_head = MLP(hidden_dim, hidden_dim, 4, 3)
    nn.init.zeros_(box_head.layers[-1].weight)
    nn.init.zeros_(box_head.layers[-1].bias)
    if not with_box_refine:
        _start_small(box_head)
        return nn.ModuleList([class_head] * count), nn.ModuleList([box_head] * count)
    class_heads = nn.ModuleList(copy.deepcopy(class_head) for _ in range(count))
    box_heads = nn.ModuleList(copy.deepcopy(box_head) for _ in range(count))
    if not two_stage:  # proposals bring sizes of their own
        _start_small(box_heads[0])
    return class_heads, box_heads


def decode_boxes(deltas: Tensor, reference: Tensor) -> Tensor:
    """Head output [..., 4] and reference points [..., 2] or boxes [..., 4] in [0, 1] -> boxes
    cxcywh in [0, 1].
    """
    logits = torch.logit(reference, eps=1e-5)
    if logits.shape[-1] == 2:
        logits = F.pad(logits, (0, 2))
    return (deltas + logits).sigmoid()


def _start_small(box_head: MLP) -> None:
    """Width and height begin at sigmoid(-2) = 0.12 of the image."""
    nn.init.constant_(box_head.layers[-1].bias[2:], -2.0)
