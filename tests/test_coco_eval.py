"""COCO's figures by faster-coco-eval: pycocotools, called by itself, is the judge, and every bit
counts.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import coco_eval
from datasets.coco_eval import evaluate_results, precision_tables
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, run_main, write_coco
from util.run.state import warn_about_changes

TABLES = ("precision", "recall", "scores")
FIRST = 1 - 2**-52  # pycocotools' precision of one right detection of one


Entries = list[dict[str, Any]]


def coco_of(images: list[int], categories: list[int], objects: Entries, first_id: int = 0) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "width": 640, "height": 480} for number in images],
        "categories": [{"id": number, "name": str(number)} for number in categories],
        "annotations": [{"id": first_id + i, "iscrowd": 0, **entry} for i, entry in enumerate(objects)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def judge(truth: COCO, detections: Entries) -> COCOeval:
    """pycocotools by itself, on objects numbered from 1: it takes one with the id 0 for not found.

    Detections of equal score count in the order of their images.
    """
    images, categories = [*truth.imgs], [*truth.cats]
    found = [{**entry, "area": entry["bbox"][2] * entry["bbox"][3]} for entry in detections]
    found.sort(key=lambda entry: entry["image_id"])
    without_ids = [{k: v for k, v in entry.items() if k != "id"} for entry in truth.dataset["annotations"]]
    sides = [coco_of(images, categories, entries, first_id=1) for entries in (without_ids, found)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def bits(evaluation: Any) -> dict[str, Any]:
    """All that may be compared, such that equal means: no bit differs."""
    arrays = {name: np.ascontiguousarray(evaluation.eval[name]) for name in TABLES}
    return {
        **{name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()},
        "stats": np.asarray(evaluation.stats).tobytes(),
        "counts": list(evaluation.eval["counts"]),
        "categories": list(evaluation.params.catIds),
        "recalls": evaluation.params.recThrs.tobytes(),
    }


# ---- random data


def random_data(seed: int) -> tuple[COCO, Entries]:
    """Objects and detections. Some data sets have crowds, ids of 0 and below, images without
    objects or detections, more than 100 detections of a class in an image, areas at the limits of
    the ranges, one class, equal scores, or no detections.
    """
    rng = np.random.default_rng(seed)
    images = (rng.permutation(rng.choice([0, 1, 2, 5, 15])) * 3 - rng.choice([0, 0, 1, 3])).tolist()
    categories = (rng.permutation(rng.choice([1, 2, 5, 12])) * 2 - rng.choice([0, 0, 1, 2])).tolist()
    on_a_grid = rng.random() < 0.3
    objects, detections = [], []

    def box() -> list[float]:
        if on_a_grid:
            return [*(rng.integers(0, 4, 2) * 16.0).tolist(), *rng.choice([0.0, 16, 32, 48, 96], 2).tolist()]
        return [*rng.uniform(0, 200, 2).tolist(), *rng.uniform(0, rng.choice([8, 60, 100, 300]), 2).tolist()]

    def add(to: list, image: int, category: int, box: list[float], **more: Any) -> None:
        to.append({"image_id": image, "category_id": category, "bbox": box, **more})

    for image in images:
        for _ in range(rng.choice([0, 1, 3, 12])):
            x, y, width, height = box()
            area = float(rng.choice([width * height, width * height * 0.6, 0, 32**2, 96**2, 1e10]))
            more = {"area": area, "iscrowd": int(rng.random() < 0.15)}
            add(objects, image, int(rng.choice(categories)), [x, y, width, height], **more)
    kind = rng.choice(["none", "anywhere", "near", "both"])
    digits = int(rng.choice([1, 2, 17]))
    if kind in ("anywhere", "both"):
        for image in images:
            for _ in range(rng.choice([0, 5, 60, 230])):
                add(detections, image, int(rng.choice(categories)), box(), score=round(rng.random(), digits))
    if kind in ("near", "both"):
        for entry in objects:
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, rng.choice([0, 1, 4]), 4)
                x, y, width, height = (np.array(entry["bbox"]) + noise).tolist()
                category = entry["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
                moved = [x, y, max(0.0, width), max(0.0, height)]
                add(detections, entry["image_id"], category, moved, score=round(rng.random(), digits))
    rng.shuffle(objects)
    rng.shuffle(detections)
    return coco_of(images, categories, objects), detections


def test_faster_coco_eval_gives_the_bits_of_pycocotools():
    seen = Counter()
    for seed in range(150):
        truth, detections = random_data(seed)
        expected, evaluation = judge(truth, detections), evaluate_results(truth, detections)
        assert type(evaluation).__module__.startswith("faster_coco_eval")
        assert bits(evaluation) == bits(expected), f"seed {seed}"
        assert bits(evaluate_results(truth, detections, "pycocotools")) == bits(expected), f"seed {seed}"
        annotated = truth.dataset["annotations"]
        of_a_class = Counter((entry["image_id"], entry["category_id"]) for entry in detections)
        without_objects = truth.imgs.keys() - {entry["image_id"] for entry in annotated}
        seen["crowd"] += any(entry["iscrowd"] for entry in annotated)
        seen["id 0"] += 0 in truth.imgs and 0 in truth.cats and 0 in truth.anns
        seen["over 100"] += max(of_a_class.values(), default=0) > 100
        seen["an image without objects"] += bool(annotated) and bool(without_objects)
        seen["one class"] += len(truth.cats) == 1
        seen["no detections"] += not detections
        seen["1 - 2^-52"] += bool((expected.eval["precision"] == FIRST).any())
        seen["an AP between 0 and 1"] += bool(0 < expected.stats[0] < 1)
    assert min(seen.values()) >= 3, f"not all that is to be compared came up: {seen}"


# ---- where the two libraries differ


BOX = [10.0, 10, 40, 40]


def in_a_row(objects: int, found: str) -> tuple[COCO, Entries]:
    """An object in every image and a crowd in the last. Scores fall: r(ight), w(rong), i(n the
    crowd).
    """
    images = list(range(objects + 1))
    entries = [{"image_id": image, "category_id": 3, "bbox": BOX, "area": 1600.0} for image in images[:-1]]
    entries.append({"image_id": objects, "category_id": 3, "bbox": BOX, "area": 1600.0, "iscrowd": 1})
    detections, right = [], iter(images)
    for i, what in enumerate(found):
        image = next(right) if what == "r" else objects
        box = [300.0, 300, 40, 40] if what == "w" else BOX
        detections.append({"image_id": image, "category_id": 3, "bbox": box, "score": 1 - i / 10})
    return coco_of(images, [3], entries, first_id=1), detections


@pytest.mark.parametrize(
    ("objects", "found", "first"),
    [
        (1, "r", FIRST),
        (1, "rw", FIRST),
        (1, "rww", FIRST),
        (1, "irw", FIRST),
        (1, "riw", FIRST),
        (2, "r", FIRST),
        (2, "rw", FIRST),
        (2, "rwr", FIRST),
        (3, "rw", FIRST),
        (4, "rwr", FIRST),
        (5, "rwrr", FIRST),
        (200, "rw", FIRST),
        (2, "rr", 1),
        (2, "rrw", 1),
        (2, "rir", 1),
        (3, "rr", 1),
        (4, "rrw", 1),
        (5, "rrwr", 1),
        (7, "iirr", 1),
        (200, "rr", 1),
        (1, "wr", 0.5),
        (1, "", 0),
    ],
)
def test_the_precision_of_one_right_detection_is_that_of_pycocotools(objects, found, first):
    truth, detections = in_a_row(objects, found)
    evaluation, expected = evaluate_results(truth, detections), judge(truth, detections)
    assert evaluation.eval["precision"][0, 0, 0, 0, 2] == first
    assert bits(evaluation) == bits(expected)


@pytest.mark.parametrize("odd", ["a score that is not a number", "an infinite box", "ids beyond 2^53"])
def test_what_faster_coco_eval_can_not_take_is_left_to_pycocotools(odd):
    truth, detections = in_a_row(3, "rrw")
    if odd == "ids beyond 2^53":
        far = {image: 2**53 + image for image in truth.imgs}
        objects = [{**entry, "image_id": far[entry["image_id"]]} for entry in truth.dataset["annotations"]]
        truth = coco_of([*far.values()], [3], objects)
        detections = [{**entry, "image_id": far[entry["image_id"]]} for entry in detections]
    elif odd == "an infinite box":
        detections[0]["bbox"] = [10.0, 10, float("inf"), 40]
    else:
        detections[0]["score"] = float("nan")
    evaluation = evaluate_results(truth, detections)
    assert isinstance(evaluation, COCOeval)
    assert bits(evaluation) == bits(judge(truth, detections))


def test_tables_are_those_of_either():
    truth, detections = random_data(5)
    ours = precision_tables(evaluate_results(truth, detections, "faster"))
    theirs = precision_tables(evaluate_results(truth, detections, "pycocotools"))
    assert list(ours) == [*TABLES, "category_ids", "stats"] == list(theirs)
    assert all(ours[name].equal(theirs[name]) and ours[name].is_contiguous() for name in TABLES)
    assert (ours["category_ids"], ours["stats"]) == (theirs["category_ids"], theirs["stats"])


# ---- which of them is used


def test_without_faster_coco_eval_pycocotools_is_used_and_one_warning_says_so(monkeypatch, caplog):
    truth, detections = random_data(5)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    coco_eval._faster_coco_eval.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            evaluations = [evaluate_results(truth, detections) for _ in range(2)]
    finally:
        coco_eval._faster_coco_eval.cache_clear()
    assert all(isinstance(evaluation, COCOeval) for evaluation in evaluations)
    (record,) = caplog.records
    assert "pip install 'faster-coco-eval" in record.message


def test_the_flag_chooses(tmp_path):
    """A faster-coco-eval that can't be imported does not matter to a run with --coco_eval
    pycocotools.
    """
    (tmp_path / "faster_coco_eval.py").write_text("raise ImportError('not here')")
    write_coco(tmp_path / "data", 4, 2)
    flags = ("--coco_path", str(tmp_path / "data"), *SMALL_IMAGES, *SMALL_MODEL, "--epochs", "1")
    result = run_main(*flags, "--coco_eval", "pycocotools", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "AP50" in result.stdout
    assert "faster-coco-eval can't be imported" not in result.stdout


def test_a_run_goes_on_with_the_other_without_a_word(caplog):
    warn_about_changes({"coco_eval": "faster", "lr": 1.0}, {"coco_eval": "pycocotools", "lr": 1.0})
    assert not caplog.records
