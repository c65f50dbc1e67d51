"""From the detections of an image, whose masks overlap, to a panoptic map."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from datasets.panoptic.format import VOID

SCORE_THRESHOLD = 0.3  # as in pictures of detections
OVERLAP_THRESHOLD = 0.8  # MaskFormer's, for COCO
INSIDE = 0.5  # probability from which a pixel belongs to a mask


class Segment(NamedTuple):
    """A segment of a merged map. label: of the class head. score: of its best detection."""

    id: int
    label: int
    score: float


class Merged(NamedTuple):
    """ids: [H, W] int32 on the masks' device, the id of every pixel's segment, or VOID. segments: their
    ids are 1, 2, ..., best first. format.describe makes COCO's form of it.
    """

    ids: Tensor
    segments: list[Segment]


@torch.no_grad()
def merge(
    scores: Tensor,
    labels: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    stuff: Container[int],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    overlap_threshold: float = OVERLAP_THRESHOLD,
) -> Merged:
    """The panoptic map of an image.

    The rule is that of "MaskFormer" (arXiv 2107.06278, section 3.4), for sigmoid scores:

    1. Detections with a score of at most `score_threshold` are dropped. There is no class "nothing".
    2. The masks of a stuff class become one segment, their union. MaskFormer joins them last; two equal
       masks would then take pixels from each other, and rule 4 would drop both.
    3. A pixel goes to the segment with the highest score * mask probability, among the masks that have
       at least INSIDE there. Without such a mask it is void.
    4. A segment that got less than the share `overlap_threshold` of its mask is dropped, and its pixels
       are void: most of it was another segment.

    Args:
        scores: [n], from 0 to 1, best first. labels: [n] int64.
        mask_logits: [n, h, w], of the image without padding. They are resized to `size` one at a time,
            so memory does not grow with n.
        size: height and width of the map, in pixels.
        stuff: the labels of stuff. Others are things.
    """
    best = torch.zeros(size, device=mask_logits.device)
    winner = torch.zeros(size, dtype=torch.int32, device=mask_logits.device)
    candidates: dict[tuple[int, ...], Segment] = {}  # things by label and place, stuff by label
    mask_areas: dict[int, Tensor] = {}
    unions: dict[int, Tensor] = {}
    rows = zip((scores > score_threshold).tolist(), scores.tolist(), labels.tolist(), strict=True)
    for i, (kept, score, label) in enumerate(rows):
        if not kept:
            continue
        probability = _resized(mask_logits[i], size).sigmoid()
        inside = probability >= INSIDE
        key = (label,) if label in stuff else (label, i)
        number = candidates.setdefault(key, Segment(len(candidates) + 1, label, score)).id
        if label in stuff:
            unions[label] = unions.get(label, inside) | inside
        mask_areas[number] = unions.get(label, inside).sum()

        # a tie goes to the earlier one
        value = score * probability * inside
        better = value > best
        best, winner = torch.where(better, value, best), winner.masked_fill(better, number)
    return _without_covered(winner, list(candidates.values()), list(mask_areas.values()), overlap_threshold)


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[h, w] of any floats to [H, W] float32."""
    logits = logits.float()
    if logits.shape == size:
        return logits
    return functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _without_covered(
    winner: Tensor, candidates: list[Segment], mask_areas: list[Tensor], threshold: float
) -> Merged:
    """Rule 4. The segments that stay get new numbers, without gaps."""
    if not candidates:
        return Merged(winner, [])
    won = torch.bincount(winner.flatten(), minlength=len(candidates) + 1)[1:]
    stays = (won > 0) & (won >= threshold * torch.stack(mask_areas))
    numbers = torch.cat([stays.new_full((1,), VOID, dtype=torch.int64), stays.cumsum(0) * stays])
    left = [segment for segment, stay in zip(candidates, stays.tolist(), strict=True) if stay]
    segments = [segment._replace(id=number) for number, segment in enumerate(left, 1)]
    return Merged(numbers[winner].to(torch.int32), segments)
