"""The heads that turn a query into class logits and a box."""

from __future__ import annotations

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.step.precision import full_precision

# of a foreground class at the start (focal loss, arXiv 1708.02002, section 4.1)
PRIOR_PROBABILITY = 0.01


class ClassHead(nn.Linear):
    """A linear layer in the type of its weights, under autocast too.

    Most logits would be equal to others in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return super().forward(x.to(self.weight.dtype))


class MLP(nn.Module):
    """Linear layers with ReLU between them, in the type of their weights, under autocast too.

    The logits of a box in bfloat16 are wrong by pixels.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    @property
    def last(self) -> nn.Linear:
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            x = x.to(self.last.weight.dtype)
            for layer in self.layers[:-1]:
                x = F.relu(layer(x))
            return self.layers[-1](x)


def build_heads(
    hidden_dim: int, num_classes: int, num_layers: int, with_box_refine: bool, two_stage: bool
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Class heads and box heads, one per decoder layer.

    In two-stage there is one more of each, for the encoder's proposals. With box refinement every
    head has its own weights, otherwise all are the same module.
    """
    count = num_layers + two_stage
    # a fresh model says every class with the prior probability
    class_head = ClassHead(hidden_dim, num_classes)
    nn.init.constant_(class_head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    box_head = MLP(hidden_dim, hidden_dim, 4, 3)
    # boxes begin at their reference points
    nn.init.zeros_(box_head.last.weight)
    nn.init.zeros_(box_head.last.bias)
    if not with_box_refine:
        _start_small(box_head)
        return nn.ModuleList([class_head] * count), nn.ModuleList([box_head] * count)
    class_heads = nn.ModuleList(copy.deepcopy(class_head) for _ in range(count))
    box_heads = [copy.deepcopy(box_head) for _ in range(count)]
    # later layers refine the first one's boxes, and proposals bring sizes of their own
    if not two_stage:
        _start_small(box_heads[0])
    return class_heads, nn.ModuleList(box_heads)


def decode_boxes(deltas: Tensor, reference: Tensor) -> Tensor:
    """Boxes [..., 4] cxcywh in [0, 1] ("Deformable DETR", appendix A.3 and A.4).

    Args:
        deltas: [..., 4] output of a box head.
        reference: points [..., 2] or boxes [..., 4] in [0, 1].
    """
    # the head's output is a change before the sigmoid; eps keeps 0 and 1 finite
    logits = torch.logit(reference, eps=1e-5)
    # a point has no size that the head's could be added to
    if logits.shape[-1] == 2:
        logits = F.pad(logits, (0, 2))
    return (deltas + logits).sigmoid()


def _start_small(box_head: MLP) -> None:
    """Width and height begin at sigmoid(-2) = 0.12 of the image."""
    nn.init.constant_(box_head.last.bias[2:], -2.0)
