"""Bipartite matching of predictions and targets ("DETR", section 3.1).

Shape letters: N outputs matched together, B images, Q queries, K classes, T targets of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from util.box_ops import generalized_iou
from util.step.precision import full_precision, widened
from util.step.transfer import to_device, to_host

# queries from which on the search for the cheapest is faster than their copy to the host
MANY = 2048


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, one image after another.

    boxes: [T, 4] cxcywh in [0, 1]; labels: [T] int64; image: [T] int64, the index of the image;
    count: [B] int64, the number of targets of every image; counts: the same on the host.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    count: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def from_list(targets: Sequence[dict[str, Tensor]], num_streams: int = 1) -> Targets:
        """The targets of a list of images; with two streams every image counts twice."""
        targets = list(targets) * num_streams
        counts = tuple(len(target["labels"]) for target in targets)
        boxes = torch.cat([target["boxes"] for target in targets]).reshape(-1, 4)
        labels = torch.cat([target["labels"] for target in targets])
        # made on the host, which knows the counts, so that the device need not be asked
        count = torch.tensor(counts, dtype=torch.int64)
        image = torch.from_numpy(np.arange(len(counts)).repeat(counts))
        device = boxes.device
        return Targets(boxes, labels, to_device(image, device), to_device(count, device), counts)

    def of_one_class(self) -> Targets:
        """The same with every label 0: proposals distinguish only objects and background."""
        return replace(self, labels=torch.zeros_like(self.labels))

    def __len__(self) -> int:
        return sum(self.counts)


class HungarianMatcher:
    """One-to-one matching of least cost ("Deformable DETR", appendix A.3; "DETR", eq. 1).

    Args:
        cost_class, cost_bbox, cost_giou: weights of the focal class cost, the L1 distance and the
            negated generalised IoU.
        focal_alpha: alpha of the focal cost.
    """

    def __init__(
        self, cost_class: float, cost_bbox: float, cost_giou: float, focal_alpha: float = 0.25
    ) -> None:
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.focal_alpha = focal_alpha

    @torch.no_grad()
    def __call__(self, groups: Sequence[tuple[Tensor, Tensor, Targets]]) -> list[tuple[Tensor, Tensor]]:
        """Match several groups of outputs, in float32 or float64.

        Args:
            groups: logits [N, B, Q, K], boxes [N, B, Q, 4] and targets; e.g. all decoder layers,
                and the encoder's output.

        Returns:
            per group the matched queries as flat indices into [N, B, Q], and their targets in [0,
            T): both [N, T'] int64 on the device, image after image. T' is T unless an image has
            more targets than queries.
        """
        device = groups[0][0].device
        with full_precision(device):
            costs = [
                self._cost(widened(logits), widened(boxes), targets) for logits, boxes, targets in groups
            ]

        # one transfer to the host, where SciPy assigns, and one back
        given = [_cheapest(cost, targets.counts) for cost, (_, _, targets) in zip(costs, groups, strict=True)]
        host = iter(to_host(*(tensor for of_group in given for tensor in of_group)))
        matched = []
        for of_group, (logits, _, targets) in zip(given, groups, strict=True):
            arrays = [next(host).numpy() for _ in of_group]
            matched.append(_assign(*arrays, counts=targets.counts, num_queries=logits.shape[2]))
        flat = torch.from_numpy(np.concatenate([pairs.ravel() for pairs in matched]))
        back = to_device(flat, device).split([pairs.size for pairs in matched])

        results = []
        for indices, pairs in zip(back, matched, strict=True):
            query_NT, target_NT = indices.view(pairs.shape)
            results.append((query_NT, target_NT))
        return results

    def _cost(self, logits_NBQK: Tensor, boxes_NBQ4: Tensor, targets: Targets) -> Tensor:
        """[N, T, Q]: each target against the queries of its own image only."""
        # of all pairs within an image, not of all pairs: [N, T, Q] instead of [N, B, Q, T]
        cost_bbox = (boxes_NBQ4[:, targets.image] - targets.boxes[:, None]).abs().sum(-1)
        # GIoU needs corners
        corners = box_convert(boxes_NBQ4, "cxcywh", "xyxy")[:, targets.image]
        cost_giou = -generalized_iou(corners, box_convert(targets.boxes, "cxcywh", "xyxy")[:, None])
        cost_class = self._class_cost(logits_NBQK[:, targets.image, :, targets.labels].transpose(0, 1))
        return self.cost_class * cost_class + self.cost_bbox * cost_bbox + self.cost_giou * cost_giou

    def _class_cost(self, logits: Tensor) -> Tensor:
        """The focal loss of the target's class as a positive minus that as a negative; gamma is 2."""
        # the sum over the other classes is the same for all targets and cancels
        probability = logits.sigmoid()
        positive = self.focal_alpha * (1 - probability) ** 2 * -(probability + 1e-8).log()
        negative = (1 - self.focal_alpha) * probability**2 * -(1 - probability + 1e-8).log()
        return positive - negative


def _cheapest(cost_NTQ: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The costs that the assignment needs: of many queries [N, T, P], with their indices behind them.

    Of n targets in an image, each has a best match among its n cheapest queries, because the others
    can't take all of them. So few of two-stage's 20,000 proposals are copied to the host.
    """
    if cost_NTQ.shape[-1] <= MANY:
        return (cost_NTQ,)
    cheapest = cost_NTQ.topk(min(max(counts, default=0), cost_NTQ.shape[-1]), largest=False)
    # one type for one copy, exact up to 2**24 queries
    return cheapest.values, cheapest.indices.to(cost_NTQ.dtype)


def _assign(
    cost_NTP: np.ndarray,
    query_NTP: np.ndarray | None = None,
    *,
    counts: Sequence[int],
    num_queries: int,
) -> np.ndarray:
    """The assignment of least cost per output and image.

    Args:
        query_NTP: the queries of these costs, without it all of them in their order.

    Returns:
        [2, N, T'] int64: flat query indices in [N, B, Q], and target indices.
    """
    num_outputs = len(cost_NTP)
    # SciPy refuses NaN; the check of the loss reports it with a diagnosis
    cost_NTP = np.nan_to_num(cost_NTP, nan=1e6, posinf=1e6, neginf=-1e6)
    starts = np.cumsum([0, *counts])
    pairs = [[np.empty((2, 0), np.int64)] for _ in range(num_outputs)]
    for output in range(num_outputs):
        for image, (start, count) in enumerate(zip(starts, counts, strict=False)):
            # rows of the image's targets
            cost = cost_NTP[output, start : start + count]
            if query_NTP is None:
                query, target = linear_sum_assignment(cost.T)
            else:
                own = query_NTP[output, start : start + count, :count]
                query, target = _assign_among(cost[:, :count], own)
            offset = (output * len(counts) + image) * num_queries
            pairs[output].append(np.stack([offset + query, start + target]))
    return np.stack([np.concatenate(columns, 1) for columns in pairs], 1)


def _assign_among(cost_TP: np.ndarray, query_TP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and targets of the assignment in which each target has one of its P queries."""
    queries, column = np.unique(query_TP, return_inverse=True)
    cost = np.full((len(cost_TP), len(queries)), np.inf)
    np.put_along_axis(cost, column.reshape(query_TP.shape), cost_TP, 1)
    chosen, target = linear_sum_assignment(cost.T)
    return queries[chosen].astype(np.int64), target
