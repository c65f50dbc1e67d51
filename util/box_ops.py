"""Arithmetic on boxes of shape [..., 4] that torchvision.ops does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., arXiv 1902.09630, eq. 3) of broadcastable xyxy boxes
    [..., 4] -> [...].

    torchvision's `generalized_box_iou` compares all boxes with all, also those of different images,
    and its loss of pairs waits for the device (it indexes by a mask). A pair of empty boxes in one
    point gives NaN, as 0/0 does.
    """
    overlap = _area(
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    )
    hull = _area((torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0))
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - overlap
    return overlap / union - (hull - union) / hull


def _area(sides: Tensor) -> Tensor:
    # the backward of prod() waits for the device
    return sides[..., 0] * sides[..., 1]
