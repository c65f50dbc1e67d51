"""From the detections of an image, whose masks overlap, to a panoptic map."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets.panoptic.format import VOID, Panoptic, describe
from util.class_map import ClassMap
from util.config import DataConfig

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


def panoptic_of(
    scores: Tensor,
    labels: Tensor,
    masks: Any,
    classes: ClassMap,
    *,
    score_threshold: float = DataConfig.panoptic_score,
    overlap_threshold: float = DataConfig.panoptic_overlap,
) -> Panoptic:
    """The panoptic map of an image's detections, at the image's size, in COCO's form.

    Args:
        scores, labels: [n], best first. masks: an object that has their `logits`, as `merge` takes them,
            and their `target_size` (models.masks.ImageMasks).
        classes: those of the detector, with stuff.
    """
    height, width = masks.target_size.tolist()
    ids, segments = merge(
        scores,
        labels,
        masks.logits(),
        (height, width),
        classes.stuff or (),
        score_threshold=score_threshold,
        overlap_threshold=overlap_threshold,
    )
    return describe(ids.cpu().numpy(), {segment.id: classes.id_of(segment.label) for segment in segments})


@torch.no_grad()
def merge(
    scores: Tensor,
    labels: Tensor,
    mask_logits: Iterable[Tensor],
    size: tuple[int, int],
    stuff: Container[int],
    *,
    score_threshold: float = DataConfig.panoptic_score,
    overlap_threshold: float = DataConfig.panoptic_overlap,
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
        mask_logits: n masks [H, W]. They are taken one at a time, and none of a dropped detection, so
            memory does not grow with n.
        size: H and W, in pixels.
        stuff: the labels of stuff. Others are things.
    """
    best = torch.zeros(size)
    winner = torch.zeros(size, dtype=torch.int32)
    candidates: dict[tuple[int, ...], Segment] = {}  # things by label and place, stuff by label
    mask_areas: dict[int, Tensor] = {}
    unions: dict[int, Tensor] = {}
    kept = int((scores > score_threshold).sum())
    # the masks come last: none is taken after the last score
    rows = zip(scores[:kept].tolist(), labels[:kept].tolist(), mask_logits, strict=False)
    for i, (score, label, logits) in enumerate(rows):
        probability = logits.float().sigmoid()
        inside = probability >= INSIDE
        key = (label,) if label in stuff else (label, i)
        number = candidates.setdefault(key, Segment(len(candidates) + 1, label, score)).id
        if label in stuff:
            unions[label] = unions.get(label, inside) | inside
        mask_areas[number] = unions.get(label, inside).sum()

        # a tie goes to the earlier one
        value = score * probability * inside
        best, winner = best.to(value.device), winner.to(value.device)  # known from the first mask
        better = value > best
        best, winner = torch.where(better, value, best), winner.masked_fill(better, number)
    return _without_covered(winner, list(candidates.values()), list(mask_areas.values()), overlap_threshold)


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
