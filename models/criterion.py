"""The losses.

A new loss term touches two files. Here: its name in WEIGHT_FLAGS, and its sum in
`SetCriterion._group_losses`. In util/config: the flag with its weight, a field of LossConfig.

Shape letters: N outputs (decoder layers) treated together, B images of all streams, Q queries, K
classes, T targets of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from models.masks import mask_losses
from models.matcher import HungarianMatcher, Targets
from util.box_ops import generalized_iou
from util.distributed.processes import average_number
from util.step.precision import full_precision, widened
from util.step.transfer import to_device

# name of a loss -> the flag with its weight
WEIGHT_FLAGS = {
    "loss_ce": "cls_loss_coef",
    "loss_bbox": "bbox_loss_coef",
    "loss_giou": "giou_loss_coef",
}
# the same with --masks, of the last decoder layer alone
MASK_WEIGHT_FLAGS = {"loss_mask": "mask_loss_coef", "loss_dice": "dice_loss_coef"}


class SetCriterion(nn.Module):
    """Set prediction losses of DETR with focal classification ("Deformable DETR", appendix A.3).

    Args:
        matcher: pairs predictions with targets.
        weights: the weight of each loss of WEIGHT_FLAGS, the same at every output; and with a mask head
            of MASK_WEIGHT_FLAGS.
        num_aux_outputs: number of earlier decoder layers with losses (suffixes _0, _1, ...).
        with_proposals: whether the encoder's output has losses too (suffix _enc), with all its
            labels 0.
        focal_alpha: alpha of the focal loss; gamma is 2.

    Attributes:
        weight_dict: name of every loss that trains, with its suffix -> its weight. `total` sums
            these; the other entries of `forward`'s result are for the log.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        weights: dict[str, float],
        num_aux_outputs: int,
        with_proposals: bool,
        focal_alpha: float = 0.25,
    ) -> None:
        super().__init__()
        self.matcher, self.focal_alpha = matcher, focal_alpha
        suffixes = _suffixes(1 + num_aux_outputs)
        if with_proposals:
            suffixes.append("_enc")
        self.weight_dict = {name + suffix: weights[name] for suffix in suffixes for name in WEIGHT_FLAGS}
        self.weight_dict |= {name: weights[name] for name in MASK_WEIGHT_FLAGS if name in weights}

    def forward(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Match predictions with targets and compute every loss, in float32 or float64.

        Args:
            outputs: the detector's (DeformableDETR.forward). With two streams both halves are
                supervised by the same targets.
            targets: per image `boxes` [n, 4] cxcywh in [0, 1] and `labels` [n] int64; with a mask head
                also `masks` [n, H, W] bool.

        Returns:
            scalars: those of weight_dict; and for the log, without gradient, class_error (of the
            last layer, in percent) and cardinality_error (of every output).
        """
        flat = Targets.from_list(targets, outputs.get("num_streams", 1))
        # float32 or float64 even inside an autocast block
        with full_precision(flat.boxes.device):
            groups, num_boxes = self._groups(outputs, flat), self._num_boxes(flat)
            # all groups at once: one transfer to the host
            matches = self.matcher([(group.logits, group.boxes, group.targets) for group in groups])
            losses = self._losses(groups, matches, num_boxes)
            if "loss_mask" in self.weight_dict:
                losses |= self._mask_losses(outputs, targets, flat.counts, *matches[0], num_boxes)
            return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses of weight_dict, a scalar: what is differentiated."""
        values = torch.stack([losses[name] for name in self.weight_dict])
        weights = torch.tensor([*self.weight_dict.values()], dtype=values.dtype)
        return (values * to_device(weights, values.device)).sum()

    def _losses(
        self,
        groups: list[OutputGroup],
        matches: list[tuple[Tensor, Tensor]],
        num_boxes: Tensor | float,
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for group, match in zip(groups, matches, strict=True):
            for key, per_output in self._group_losses(group, *match, num_boxes).items():
                for suffix, value in zip(group.suffixes, per_output.unbind(), strict=True):
                    losses[key + suffix] = value
        losses["class_error"] = _class_error(groups[0], *matches[0], num_boxes)
        return losses

    def _groups(self, outputs: dict[str, Any], targets: Targets) -> list[OutputGroup]:
        """All decoder layers as one group, the last layer first; the proposals as another."""
        layers = [outputs, *outputs.get("aux_outputs", [])]
        groups = [OutputGroup.of(layers, _suffixes(len(layers)), targets)]
        # a group of its own: it has S proposals and not Q queries
        if "enc_outputs" in outputs:
            groups.append(OutputGroup.of([outputs["enc_outputs"]], ["_enc"], targets.of_one_class()))
        return groups

    def _num_boxes(self, targets: Targets) -> Tensor | float:
        """What the losses are divided by: the number of targets, in training the mean over processes."""
        # in evaluation processes may have different numbers of batches and cannot wait for each other
        if not self.training:
            return max(float(len(targets)), 1.0)
        # the gradient is then that of one process with all images
        return average_number(len(targets), targets.boxes.device).clamp(min=1)

    def _group_losses(
        self, group: OutputGroup, query_NT: Tensor, target_NT: Tensor, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Every loss of every output: name -> [N]."""
        # boxes of the matched pairs, [N, T', 4]
        predicted = group.boxes.flatten(0, 2)[query_NT]
        wanted = group.targets.boxes[target_NT]
        giou = generalized_iou(*(box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, wanted)))
        return {
            "loss_ce": self._class_loss(group, query_NT, target_NT) / num_boxes,
            "loss_bbox": (predicted - wanted).abs().sum((1, 2)) / num_boxes,
            "loss_giou": (1 - giou).sum(1) / num_boxes,
            "cardinality_error": _cardinality_error(group),
        }

    def _mask_losses(
        self,
        outputs: dict[str, Any],
        targets: Sequence[dict[str, Tensor]],
        counts: Sequence[int],
        query_NT: Tensor,
        target_NT: Tensor,
        num_boxes: Tensor | float,
    ) -> dict[str, Tensor]:
        """The losses of the masks: of the last decoder layer, which is the first of the N outputs."""
        masks = [target["masks"] for target in targets]
        embeds = outputs["pixel_embed"], outputs["mask_embed"]
        losses = mask_losses(*embeds, masks, counts, query_NT[0], target_NT[0])
        return {name: loss / num_boxes for name, loss in losses.items()}

    def _class_loss(self, group: OutputGroup, query_NT: Tensor, target_NT: Tensor) -> Tensor:
        """Focal loss (arXiv 1708.02002, eq. 5) summed over queries and classes: [N].

        The published form, a mean over queries times their number, is the same.
        """
        num_classes = group.logits.shape[-1]
        # one-hot labels; those of unmatched queries are all 0
        is_class = torch.zeros_like(group.logits, memory_format=torch.contiguous_format)
        matched_NT = query_NT * num_classes + group.targets.labels[target_NT]
        # `is_class[indices] = 1` would copy the 1 from the host, which synchronises with the GPU
        is_class.view(-1).scatter_(0, matched_NT.flatten(), 1.0)
        loss = sigmoid_focal_loss(group.logits, is_class, alpha=self.focal_alpha, gamma=2)
        return loss.sum((1, 2, 3))


@dataclass(frozen=True)
class OutputGroup:
    """N outputs of one shape: logits [N, B, Q, K], boxes [N, B, Q, 4] cxcywh, N suffixes of the
    names of their losses, and their targets.
    """

    logits: Tensor
    boxes: Tensor
    suffixes: Sequence[str]
    targets: Targets

    @staticmethod
    def of(outputs: Sequence[dict[str, Tensor]], suffixes: Sequence[str], targets: Targets) -> OutputGroup:
        logits = torch.stack([output["pred_logits"] for output in outputs])
        boxes = torch.stack([output["pred_boxes"] for output in outputs])
        return OutputGroup(widened(logits), widened(boxes), suffixes, targets)


@torch.no_grad()
def _class_error(
    group: OutputGroup, query_NT: Tensor, target_NT: Tensor, num_boxes: Tensor | float
) -> Tensor:
    """Percentage of targets whose matched query of the last decoder layer predicts another class.

    Divided by `num_boxes`, so that the mean over processes is the percentage among all targets.
    """
    predicted = group.logits.flatten(0, 2)[query_NT[0]].argmax(-1)
    correct = (predicted == group.targets.labels[target_NT[0]]).sum()
    return 100 - 100 * correct / num_boxes


@torch.no_grad()
def _cardinality_error(group: OutputGroup) -> Tensor:
    """|queries whose best class is not the last class - targets|, the mean over images: [N].

    A published statistic.
    """
    # as in DETR, whose last class is "no object"; focal loss has none
    last_class = group.logits.shape[-1] - 1
    predicted_NB = (group.logits.argmax(-1) != last_class).sum(-1)
    return (predicted_NB - group.targets.count).abs().float().mean(-1)


def _suffixes(num_layers: int) -> list[str]:
    """Suffixes of the decoder layers' losses: none for the last layer, then _0, _1, ..."""
    return ["", *(f"_{i}" for i in range(num_layers - 1))]
