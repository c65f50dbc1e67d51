"""Panoptic quality: PQ, SQ and RQ ("Panoptic Segmentation", arXiv 1801.00868, section 4).

The rules for void and crowds are those of COCO's evaluation (cocodataset.org/#panoptic-eval), and sums are
taken in its order: the figures equal its own to the bit.

Shape letters: T segments of the ground truth, F found segments, K categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from datasets.panoptic.format import VOID, Entry, Panoptic, run_starts
from util.draw.curves import percent

# what can become of a segment: true positive, false positive, false negative
TP, FP, FN = range(3)
OUTCOME = np.dtype([("category_id", np.int64), ("kind", np.int8), ("iou", np.float64)])
UNDEFINED = -1.0  # as in COCO's metrics: there was nothing to find, and nothing was found
FIGURES = {"PQ_all": (True, False), "PQ_th": (True,), "PQ_st": (False,)}  # name -> values of isthing


# ---- an image


def compare(truth: Panoptic, found: Panoptic) -> np.ndarray:
    """What became of the segments of an image.

    A pair of one category matches if its IoU is above 0.5; void pixels of the truth are in no union. A
    found segment without a match is no false positive if more than half of it lies on void and on the
    crowd of its category. Of several crowds of a category the last one counts, as in COCO's evaluation.

    Areas are counted in the maps; only the ids, categories and `iscrowd` of the segments are used.

    Returns:
        [n] of OUTCOME: true positives with their IoU, false positives and false negatives with 0.
        Concatenate the images in one order, say that of their ids, and the figures have the same bits
        for any number of processes.

    Raises:
        ValueError: the maps differ in size, or a map has an id that its segments lack.
    """
    areas = _joint_areas(truth, found)
    categories, crowd = _column(truth, "category_id"), _column(truth, "iscrowd") == 1
    found_categories = _column(found, "category_id")

    # IoU of every pair; a match is unique, because segments do not overlap
    overlap, on_void = areas[1:, 1:], areas[0, 1:]
    found_areas = areas[:, 1:].sum(axis=0)
    union = areas[1:].sum(axis=1)[:, None] + found_areas - overlap - on_void
    iou = overlap / np.maximum(union, 1)  # a union of 0 has no overlap
    matched = (iou > 0.5) & (categories[:, None] == found_categories) & ~crowd[:, None]

    # unmatched segments, without those that nobody can judge
    places = {category: place for place, category in enumerate(categories.tolist()) if crowd[place]}
    ignored = on_void.copy()
    for i, category in enumerate(found_categories.tolist()):
        if category in places:
            ignored[i] += overlap[places[category], i]
    missed = ~crowd & ~matched.any(axis=1)
    wrong = ~matched.any(axis=0) & (ignored <= 0.5 * found_areas)

    # true positives by the ids of the truth, the order of COCO's sums
    rows, columns = matched.nonzero()
    order = np.argsort(_column(truth, "id")[rows])
    return np.concatenate(
        [
            _outcomes(categories[rows[order]], TP, iou[rows[order], columns[order]]),
            _outcomes(found_categories[wrong], FP),
            _outcomes(categories[missed], FN),
        ]
    )


def _column(panoptic: Panoptic, key: str) -> np.ndarray:
    return np.array([segment[key] for segment in panoptic.segments], dtype=np.int64)


def _outcomes(categories: np.ndarray, kind: int, iou: np.ndarray | float = 0.0) -> np.ndarray:
    result = np.empty(len(categories), OUTCOME)
    result["category_id"], result["kind"], result["iou"] = categories, kind, iou
    return result


def _joint_areas(truth: Panoptic, found: Panoptic) -> np.ndarray:
    """[T + 1, F + 1] int64: pixels by their segments in both maps, in the order of the lists; 0 is void."""
    if truth.ids.shape != found.ids.shape:
        raise ValueError(f"the truth is {truth.ids.shape} pixels, and what was found {found.ids.shape}")
    # runs of equal pairs
    starts = run_starts(truth.ids, found.ids)
    lengths = np.diff(starts, append=truth.ids.size)
    first, second = truth.ids.ravel()[starts], found.ids.ravel()[starts]

    shape = len(truth.segments) + 1, len(found.segments) + 1
    pairs = _places(first, truth) * shape[1] + _places(second, found)
    # float64 holds these sums exactly
    return np.bincount(pairs, lengths, shape[0] * shape[1]).astype(np.int64).reshape(shape)


def _places(ids: np.ndarray, panoptic: Panoptic) -> np.ndarray:
    """The places of ids in the list of segments, counted from 1; 0 for VOID."""
    known = np.append(VOID, _column(panoptic, "id"))
    order = np.argsort(known)
    places = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    if not np.array_equal(known[places], ids):
        raise ValueError(f"the map has the ids {sorted({*ids.tolist()} - {*known.tolist()})}, no segments")
    return places


# ---- a data set


class Statistics(NamedTuple):
    """Sums over images by category, [K] each. Those of several processes may be added.

    iou: of the true positives, float64. tp, fp, fn: their numbers, int64.
    """

    iou: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


def statistics(outcomes: np.ndarray, categories: Sequence[Entry]) -> Statistics:
    """The sums of outcomes [n]. Outcomes of other categories are left out."""
    known = np.array([category["id"] for category in categories], dtype=np.int64)
    outcomes = outcomes[np.isin(outcomes["category_id"], known)]
    order = np.argsort(known)
    places = order[np.searchsorted(known, outcomes["category_id"], sorter=order)]
    tp, fp, fn = (
        np.bincount(places[outcomes["kind"] == kind], minlength=len(known)) for kind in (TP, FP, FN)
    )
    # bincount adds one by one, in the order of the outcomes
    return Statistics(np.bincount(places, outcomes["iou"], len(known)), tp, fp, fn)


def class_quality(sums: Statistics) -> np.ndarray:
    """[K, 3] float64: PQ, SQ and RQ of each category, from 0 to 1.

    NaN for a category that was neither there nor found.
    """
    matches = sums.tp + 0.5 * sums.fp + 0.5 * sums.fn
    # without the divisions by 0
    some, each = np.maximum(matches, 0.5), np.maximum(sums.tp, 1)
    quality = np.stack([sums.iou / some, sums.iou / each, sums.tp / some], axis=1)
    quality[matches == 0] = np.nan
    return quality


def panoptic_quality(sums: Statistics, categories: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """PQ_all, PQ_th (things) and PQ_st (stuff): each pq, sq and rq from 0 to 1, as in DETR's log.txt.

    They are means over the `n` categories that were there or found; UNDEFINED without such a category.

    Args:
        categories: those of `sums`, dictionaries with id and isthing.
    """
    quality = class_quality(sums)
    is_thing = np.array([bool(category["isthing"]) for category in categories])
    figures = {}
    for name, kinds in FIGURES.items():
        chosen = quality[np.isin(is_thing, kinds) & ~np.isnan(quality[:, 0])]
        means = np.full(3, UNDEFINED)
        if len(chosen):
            # cumsum adds one by one, as COCO's evaluation does
            means = chosen.cumsum(axis=0)[-1] / len(chosen)
        figures[name] = dict(zip(("pq", "sq", "rq"), means.tolist(), strict=True), n=len(chosen))
    return figures


def quality_table(stats: Mapping[str, Any]) -> str:
    """PQ, SQ and RQ of all, things and stuff in three lines, in percent."""
    lines = []
    for name, title in (("PQ_all", "all"), ("PQ_th", "things"), ("PQ_st", "stuff")):
        one = stats[name]
        cells = "  ".join(f"{key.upper()} {percent(one[key]):>4}" for key in ("pq", "sq", "rq"))
        lines.append(f"{title:6}  {cells}  ({one['n']} classes)")
    return "\n".join(lines)
