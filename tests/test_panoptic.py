"""Panoptic segmentation: COCO's format, panoptic quality, merging of masks, and data sets for it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torchvision.ops import box_convert

from datasets import build_dataset
from datasets.panoptic.format import (
    LARGEST_ID,
    VOID,
    Panoptic,
    describe,
    read_map,
    read_panoptic,
    write_annotations,
    write_image,
    write_map,
)
from datasets.panoptic.merge import merge
from datasets.panoptic.quality import UNDEFINED, Statistics, compare, panoptic_quality, statistics
from datasets.panoptic.truth import PanopticTruth
from datasets.synthetic.stuff import FIRST_STUFF_ID, STUFF
from datasets.synthetic.write import generate
from models import load_detector
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, keep_newest, run, write_coco
from tests.processes import run_forked, run_main_forked, run_main_together
from tools import panoptic_from_instances, predict, report
from util.class_map import ClassMap
from util.config import parse_config
from util.errors import UserError
from util.run.tensorboard import epoch_scalars

# things and stuff alternate, so that nothing can go by the id
CATEGORIES = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in (7, 2, 3, 4, 11)]
# of a synthetic set from before there were maps: sha256 of the annotations, and the mean of the picture
INSTANCES_BEFORE = "cb01c1a3ae8d442eb45e0cb1af9b22d20f307b49f847b71ac3885b2ef966b96e"
COLOUR_BEFORE = [94.54, 88.97, 87.21]
SYNTHETIC = {"train_images": 6, "val_images": 3, "image_size": 64, "num_classes": 3, "max_objects": 3}


def one_row(*pixels: int) -> np.ndarray:
    return np.array([pixels], dtype=np.int32)


def panoptic(ids: np.ndarray, categories: dict[int, int], crowds: tuple[int, ...] = ()) -> Panoptic:
    return describe(ids, categories, crowds)


def counts(truth: Panoptic, found: Panoptic) -> dict[int, tuple[float, int, int, int]]:
    """IoU sum, tp, fp and fn by category, of those that occur."""
    sums = statistics(compare(truth, found), CATEGORIES)
    rows = zip(*(column.tolist() for column in sums), strict=True)
    named = zip((category["id"] for category in CATEGORIES), rows, strict=True)
    return {number: row for number, row in named if any(row)}


# ---- format


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """Two images, one of them with a large id, a crowd and void. Returns the JSON file."""
    path = tmp_path / "panoptic_val2017.json"
    maps = path.with_suffix("")
    maps.mkdir()
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": h, "width": w} for i, h, w in ((5, 3, 4), (9, 2, 2))
    ]
    ids = np.array([[1, 1, 0, LARGEST_ID], [1, 300, 300, LARGEST_ID], [0, 300, 0, 65536]])
    kinds = {1: 7, 300: 2, LARGEST_ID: 3, 65536: 7}
    annotations = [
        write_image(maps, 5, panoptic(ids, kinds, crowds=(65536,))),
        write_image(maps, 9, panoptic(np.full((2, 2), 8), {8: 4})),
    ]
    write_annotations(path, images, CATEGORIES, annotations)
    return path


def test_what_is_written_is_read_again(small_set):
    data = read_panoptic(small_set)
    assert data.things == {7, 3, 11}
    assert data.categories == CATEGORIES
    ids, segments = data.read(5)
    assert ids.tolist() == [[1, 1, 0, LARGEST_ID], [1, 300, 300, LARGEST_ID], [0, 300, 0, 65536]]
    assert ids.dtype == np.int32
    assert segments == [
        {"id": 1, "category_id": 7, "area": 3, "bbox": [0, 0, 2, 2], "iscrowd": 0},
        {"id": 300, "category_id": 2, "area": 3, "bbox": [1, 1, 2, 2], "iscrowd": 0},
        {"id": 65536, "category_id": 7, "area": 1, "bbox": [3, 2, 1, 1], "iscrowd": 1},
        {"id": LARGEST_ID, "category_id": 3, "area": 2, "bbox": [3, 0, 1, 2], "iscrowd": 0},
    ]
    assert data.read(9).segments[0]["area"] == 4


def test_colours_are_the_bytes_of_the_id(tmp_path):
    write_map(tmp_path / "map.png", one_row(1, 256, 65536, 3 + 256 * 2 + 65536))
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "RGB"
        assert np.asarray(image).tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 2, 1]]]


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def segment_of(content: dict, image: int = 0) -> dict:
    return content["annotations"][image]["segments_info"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: segment_of(c).update(category_id=1), "image 5: segment 1 has category_id 1, which"),
        (lambda c: segment_of(c).update(id=0), "image 5: segments_info[0] has id 0; it must be"),
        (lambda c: segment_of(c).update(id=300), "image 5: two segments_info have the id 300"),
        (lambda c: segment_of(c).update(bbox=[1, 2, "a", 4]), "segments_info[0] has bbox [1, 2, 'a', 4]"),
        (lambda c: segment_of(c).pop("area"), "segments_info[0] has area None"),
        (lambda c: c["annotations"].pop(), "image 9 has no annotation"),
        (lambda c: c["images"].pop(), "image 9 has no entry in images"),
        (lambda c: c["annotations"][1].update(image_id=5), "two annotations have the image_id 5"),
        (lambda c: c["annotations"][0].update(file_name="../a.png"), "has file_name '../a.png'"),
        (lambda c: c["categories"][0].pop("isthing"), "categories[0] has isthing None"),
        (lambda c: c.pop("categories"), "it has no list 'categories'"),
        (lambda c: c["images"].append(3), "images[2] has id None"),
    ],
)
def test_faults_of_the_annotations_are_named(small_set, change, message):
    edit(small_set, change)
    with pytest.raises(UserError) as error:
        read_panoptic(small_set)
    assert str(small_set) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: segment_of(c).update(id=12), "has pixels of segment 1, which segments_info of image 5"),
        (
            lambda c: c["annotations"][0]["segments_info"].append({**segment_of(c), "id": 77}),
            "image 5 has segment 77, of which",
        ),
        (lambda c: c["images"][0].update(width=6), "is 4 x 3 pixels, but"),
        (lambda c: c["annotations"][0].update(file_name="none.png"), "none.png can't be read (No such file"),
    ],
)
def test_faults_of_a_map_are_named(small_set, change, message):
    edit(small_set, change)
    data = read_panoptic(small_set)
    with pytest.raises(UserError, match=r"\.png") as error:
        data.read(5)
    assert message in str(error.value)
    assert data.read(9).segments, "other images are not concerned"


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "jpg")])
def test_a_map_of_another_kind_is_refused(tmp_path, mode, suffix):
    path = tmp_path / f"map.{suffix}"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(UserError, match="must be a PNG of mode RGB"):
        read_map(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"must be a COCO panoptic file: check --coco_panoptic_path"):
        read_panoptic(tmp_path / "none.json")


# ---- quality


def test_a_perfect_map_has_quality_100():
    truth = panoptic(one_row(1, 1, 2, 2, 3, 0), {1: 7, 2: 7, 3: 2})
    found = panoptic(one_row(9, 9, 8, 8, 5, 5), {9: 7, 8: 7, 5: 2})
    assert counts(truth, found) == {7: (2.0, 2, 0, 0), 2: (1.0, 1, 0, 0)}
    quality = panoptic_quality(statistics(compare(truth, found), CATEGORIES), CATEGORIES)
    assert quality == {
        name: {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": n}
        for name, n in (("PQ_all", 2), ("PQ_th", 1), ("PQ_st", 1))
    }


def test_an_overlap_of_half_is_no_match():
    truth = panoptic(one_row(1, 1, 1, 2), {1: 7, 2: 2})
    assert counts(truth, panoptic(one_row(1, 1, 2, 2), {1: 7, 2: 2})) == {
        7: (2 / 3, 1, 0, 0),
        2: (0, 0, 1, 1),
    }


def test_another_category_is_no_match():
    truth = panoptic(one_row(1, 1, 1, 1), {1: 7})
    assert counts(truth, panoptic(one_row(1, 1, 1, 1), {1: 3})) == {7: (0, 0, 0, 1), 3: (0, 0, 1, 0)}


def test_void_is_in_no_union_and_excuses_what_lies_on_it():
    truth = panoptic(one_row(1, 1, 1, 0, 0, 0, 0, 0), {1: 7})
    found = panoptic(one_row(4, 4, 4, 4, 5, 5, 6, 0), {4: 7, 5: 7, 6: 2})
    assert counts(truth, found) == {7: (1.0, 1, 0, 0)}
    # exactly half on void is no excuse
    truth = panoptic(one_row(1, 1, 1, 0), {1: 7})
    assert counts(truth, panoptic(one_row(0, 0, 5, 5), {5: 7})) == {7: (0, 0, 1, 1)}


def test_a_crowd_excuses_its_own_category_and_is_never_missed():
    truth = panoptic(one_row(1, 1, 1, 2), {1: 7, 2: 2}, crowds=(1,))
    assert counts(truth, panoptic(one_row(5, 5, 5, 6), {5: 7, 6: 2})) == {2: (1.0, 1, 0, 0)}
    assert counts(truth, panoptic(one_row(5, 5, 5, 6), {5: 3, 6: 2})) == {2: (1.0, 1, 0, 0), 3: (0, 0, 1, 0)}
    assert counts(truth, panoptic(one_row(0, 0, 0, 6), {6: 2})) == {2: (1.0, 1, 0, 0)}


def test_means_leave_out_categories_that_do_not_occur():
    truth = panoptic(one_row(1, 1, 1, 2), {1: 7, 2: 3})
    found = panoptic(one_row(1, 1, 0, 5), {1: 7, 5: 11})
    quality = panoptic_quality(statistics(compare(truth, found), CATEGORIES), CATEGORIES)
    third = pytest.approx({"pq": 2 / 3 / 3, "sq": 2 / 3 / 3, "rq": 1 / 3, "n": 3})
    assert quality["PQ_all"] == third
    assert quality["PQ_th"] == third
    assert quality["PQ_st"] == {"pq": UNDEFINED, "sq": UNDEFINED, "rq": UNDEFINED, "n": 0}


def test_empty_maps_and_unlisted_ids():
    empty = Panoptic(np.zeros((2, 3), np.int32), [])
    assert len(compare(empty, empty)) == 0
    truth = panoptic(np.ones((2, 3), int), {1: 7})
    assert counts(truth, empty) == {7: (0, 0, 0, 1)}
    assert counts(empty, truth) == {}, "all of it is void"
    with pytest.raises(ValueError, match="no segments"):
        compare(Panoptic(truth.ids, []), empty)
    with pytest.raises(ValueError, match="pixels"):
        compare(empty, panoptic(np.ones((3, 2), int), {1: 7}))


def random_pair(rng: np.random.Generator) -> tuple[Panoptic, Panoptic]:
    """Segments with crowds and void, and segments that match them more or less."""
    height, width = rng.integers(4, 40, 2)

    def rectangles(ids: np.ndarray, numbers: np.ndarray) -> None:
        for number in numbers:
            top, left = rng.integers(0, height), rng.integers(0, width)
            ids[top : top + rng.integers(1, 12), left : left + rng.integers(1, 12)] = number

    def segments(ids: np.ndarray, categories: dict[int, int], crowds: tuple[int, ...] = ()) -> Panoptic:
        result = panoptic(ids, categories, crowds)
        rng.shuffle(result.segments)
        return result

    numbers = rng.choice(LARGEST_ID, 24, replace=False) + 1
    categories = dict(zip(numbers.tolist(), rng.choice([7, 7, 7, 2, 3, 4], 24).tolist(), strict=True))
    truth = np.full((height, width), rng.choice([VOID, numbers[0]]))
    rectangles(truth, rng.choice([VOID, *numbers[:12]], rng.integers(1, 20)))
    crowds = tuple(numbers[:12][rng.random(12) < 0.2].tolist())
    # of the truth some pixels change, some segments get new ids, some another category
    found = np.roll(truth, rng.integers(-1, 2, 2), axis=(0, 1))
    rectangles(found, rng.choice([VOID, *numbers], rng.integers(0, 5)))
    changed = {**categories, **{number: int(rng.choice([7, 2, 3, 4])) for number in numbers[:3].tolist()}}
    return segments(truth, categories, crowds), segments(found, changed)


def of_panopticapi(evaluation, truth: list, found: list, maps: tuple[Path, Path]) -> tuple[dict, dict]:
    """IoU sum, tp, fp and fn by category, and the figures."""
    sums = evaluation.pq_compute_single_core(
        0, list(zip(truth, found, strict=True)), *map(str, maps), known := {c["id"]: c for c in CATEGORIES}
    )
    rows = {number: (row.iou, row.tp, row.fp, row.fn) for number, row in sums.pq_per_cat.items()}
    figures = {}
    for name, things in (("PQ_all", None), ("PQ_th", True), ("PQ_st", False)):
        if any(things in (None, bool(known[number]["isthing"])) for number, row in rows.items() if any(row)):
            figures[name] = sums.pq_average(known, things)[0]
    return {number: row for number, row in rows.items() if any(row)}, figures


@pytest.fixture(scope="module")
def random_set(tmp_path_factory) -> tuple[list[tuple[Panoptic, Panoptic]], Path]:
    """1,000 pairs, and the folder of their files: truth.json, truth/, found.json and found/."""
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng) for _ in range(1000)]
    folder = tmp_path_factory.mktemp("pairs")
    for name, side in (("truth", 0), ("found", 1)):
        (folder / name).mkdir()
        annotations = [write_image(folder / name, i, pair[side]) for i, pair in enumerate(pairs)]
        shapes = [pair[0].ids.shape for pair in pairs]
        images = [
            {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width}
            for i, (height, width) in enumerate(shapes)
        ]
        write_annotations(folder / f"{name}.json", images, CATEGORIES, annotations)
    return pairs, folder


def figures_of(outcomes: np.ndarray) -> dict[str, dict[str, float]]:
    return panoptic_quality(statistics(outcomes, CATEGORIES), CATEGORIES)


def test_quality_equals_panopticapis_to_the_bit(random_set):
    """pip install --no-deps panopticapi-lite: COCO's own program. Each pair by itself, then all."""
    evaluation = pytest.importorskip("panopticapi.evaluation")
    pairs, folder = random_set
    truth, found = (
        json.loads((folder / f"{name}.json").read_text())["annotations"] for name in ("truth", "found")
    )
    maps = folder / "truth", folder / "found"
    for i, pair in enumerate(pairs):
        rows, figures = of_panopticapi(evaluation, truth[i : i + 1], found[i : i + 1], maps)
        assert counts(*pair) == rows, i
        defined = {name: value for name, value in figures_of(compare(*pair)).items() if value["n"]}
        assert defined == figures, i
    rows, figures = of_panopticapi(evaluation, truth, found, maps)
    assert figures_of(np.concatenate([compare(*pair) for pair in pairs])) == figures
    assert all(min(row[1:]) > 100 for row in rows.values()), "all cases must occur"


def test_quality_equals_hotcocos_to_the_bit(random_set):
    """pip install hotcoco: an implementation in Rust. Each pair by itself; it adds up in another order."""
    hotcoco = pytest.importorskip("hotcoco.panoptic")
    pairs, folder = random_set
    truth, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("truth", "found"))
    maps = {"gt_folder": folder / "truth", "pred_folder": folder / "found"}
    for i, pair in enumerate(pairs):
        sides = (
            {**side, "images": side["images"][i : i + 1], "annotations": side["annotations"][i : i + 1]}
            for side in (truth, found)
        )
        evaluation = hotcoco.PanopticEval(*sides, **maps)
        evaluation.evaluate()
        rows = {
            number: (row["iou"], row["tp"], row["fp"], row["fn"])
            for number, row in evaluation.results()["per_class"].items()
        }
        assert counts(*pair) == {number: row for number, row in rows.items() if any(row)}, i


# ---- merging masks


def logits_of(*masks: str) -> torch.Tensor:
    """[n, 1, W] from rows of digits: the probability in tenths."""
    probability = torch.tensor([[[int(digit) / 10 for digit in mask]] for mask in masks])
    return probability.clamp(0.001, 0.999).logit()


def merged(scores: list[float], labels: list[int], masks: torch.Tensor, **thresholds: float):
    """The map as digits, and (label, score) of each segment. Labels from 10 on are stuff."""
    size = masks.shape[-2], masks.shape[-1]
    given = {"score_threshold": 0.3, "overlap_threshold": 0.8, **thresholds}
    result = merge(torch.tensor(scores), torch.tensor(labels), masks, size, range(10, 20), **given)
    assert result.ids.dtype == torch.int32
    assert [segment.id for segment in result.segments] == list(range(1, len(result.segments) + 1))
    text = "".join(map(str, result.ids.flatten().tolist()))
    return text, [(segment.label, round(segment.score, 3)) for segment in result.segments]


def test_a_pixel_goes_to_the_highest_score_times_probability():
    masks = logits_of("99990000", "00096666")
    assert merged([0.9, 0.8], [1, 2], masks) == ("11112222", [(1, 0.9), (2, 0.8)])
    # 0.5 * 0.9 < 0.8 * 0.6
    masks = logits_of("66666000", "00009999")
    assert merged([0.8, 0.5], [1, 2], masks, overlap_threshold=0.7)[0] == "11111222"


def test_detections_of_low_score_are_dropped():
    masks = logits_of("9990", "0009")
    assert merged([0.9, 0.3], [1, 2], masks) == ("1110", [(1, 0.9)])
    assert merged([0.3, 0.2], [1, 2], masks) == ("0000", [])
    assert merged([], [], torch.zeros(0, 1, 4)) == ("0000", [])


def test_pixels_without_a_mask_of_a_half_are_void():
    # the first mask has the higher product at the last pixel, but less than a half
    assert merged([0.9, 0.4], [1, 2], logits_of("9944", "0059"), overlap_threshold=0.5)[0] == "1122"
    assert merged([0.9], [1], logits_of("9954"))[0] == "1110"


def test_a_segment_that_is_mostly_covered_is_dropped():
    masks = logits_of("9999990000", "0099999900", "0000000099")
    assert merged([0.9, 0.8, 0.7], [1, 1, 2], masks) == ("1111110022", [(1, 0.9), (2, 0.7)])
    # 2 of 6 pixels
    assert merged([0.9, 0.8, 0.7], [1, 1, 2], masks, overlap_threshold=0.33)[0] == "1111112233"
    assert merged([0.9, 0.8], [1, 1], logits_of("99", "99"), overlap_threshold=0.0)[1] == [(1, 0.9)]


def test_stuff_of_a_class_is_one_segment():
    masks = logits_of("99900000", "00000999", "00099000")
    assert merged([0.9, 0.8, 0.7], [10, 10, 11], masks) == ("11122111", [(10, 0.9), (11, 0.7)])
    # as things they are three
    assert merged([0.9, 0.8, 0.7], [1, 1, 2], masks)[0] == "11133222"
    # two masks of the same pixels do not take them from each other
    masks = logits_of("99988888", "88899999")
    assert merged([0.8, 0.8], [10, 10], masks) == ("11111111", [(10, 0.8)])
    assert merged([0.8, 0.8], [1, 1], masks) == ("00000000", [])


def test_no_mask_of_a_dropped_detection_is_taken():
    taken = []

    def masks():
        for i, mask in enumerate(logits_of("99000", "00990", "00009")):
            taken.append(i)
            yield mask

    ids = merge(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([1, 2, 1]), masks(), (1, 5), ()).ids
    assert (ids.tolist(), taken) == ([[1, 1, 2, 2, 0]], [0, 1])


# ---- the synthetic data set


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    assert generate(folder, panoptic=True, **SYNTHETIC)
    return folder


def test_synthetic_maps_have_the_objects_of_the_annotations(synthetic):
    for split, count in (("train2017", 6), ("val2017", 3)):
        data = read_panoptic(synthetic / "annotations" / f"panoptic_{split}.json")
        assert len(data.images) == count
        assert data.things == {1, 2, 3}
        instances = COCO(str(synthetic / "annotations" / f"instances_{split}.json"))
        for image_id in data.images:
            ids, segments = data.read(image_id)
            things = [segment for segment in segments if segment["category_id"] in data.things]
            objects = instances.loadAnns(instances.getAnnIds(image_id))
            for thing, annotation in zip(things, objects, strict=True):
                assert {key: thing[key] for key in ("category_id", "area", "bbox", "iscrowd")} == {
                    key: annotation[key] for key in ("category_id", "area", "bbox", "iscrowd")
                }
                assert np.array_equal(ids == thing["id"], instances.annToMask(annotation))


def test_synthetic_backgrounds_are_of_several_kinds(synthetic):
    data = read_panoptic(synthetic / "annotations" / "panoptic_train2017.json")
    names = {category["id"]: category["name"] for category in data.categories if not category["isthing"]}
    assert names == dict(enumerate(STUFF, FIRST_STUFF_ID))
    found, several = set(), 0
    for image_id in data.images:
        ids, segments = data.read(image_id)
        kinds = [segment["category_id"] for segment in segments if segment["category_id"] in names]
        assert len(kinds) == len(set(kinds)) >= 1, "one segment for each kind"
        assert np.count_nonzero(ids == VOID) <= 8, "only specks are void"
        found |= set(kinds)
        several += len(kinds) > 1
    assert found == set(names)
    assert several >= 2


def test_merging_the_true_masks_gives_the_true_map(synthetic):
    """Format, merging and quality together, over two shares of the images as two processes have them."""
    data = read_panoptic(synthetic / "annotations" / "panoptic_train2017.json")
    stuff = {category["id"] for category in data.categories} - data.things
    outcomes = []
    for image_id in data.images:
        truth = data.read(image_id)
        masks = np.stack([truth.ids == segment["id"] for segment in truth.segments])
        labels = torch.tensor([segment["category_id"] for segment in truth.segments])
        logits = torch.from_numpy(masks).float() * 20 - 10
        ids, segments = merge(torch.full((len(labels),), 0.9), labels, logits, truth.ids.shape, stuff)
        found = describe(ids.numpy(), {segment.id: segment.label for segment in segments})
        outcomes.append(compare(truth, found))
        assert len(segments) == len(truth.segments)
    shares = [statistics(np.concatenate(share), data.categories) for share in (outcomes[::2], outcomes[1::2])]
    added = Statistics(*(first + second for first, second in zip(*shares, strict=True)))
    quality = panoptic_quality(added, data.categories)["PQ_all"]
    assert [quality[name] for name in ("pq", "sq", "rq")] == [1, 1, 1]


def test_without_maps_the_synthetic_files_are_those_of_before(synthetic, tmp_path):
    assert generate(tmp_path / "plain", **SYNTHETIC)
    names = {path.name for path in (tmp_path / "plain").rglob("*")}
    assert not any("panoptic" in name for name in names)
    assert "panoptic" not in (tmp_path / "plain" / "synthetic.json").read_text()
    # the objects are the same with and without
    name = "annotations/instances_train2017.json"
    assert (synthetic / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    # and such a data set is another one
    with pytest.raises(FileExistsError, match="other settings"):
        generate(synthetic, **SYNTHETIC)
    assert not generate(synthetic, panoptic=True, **SYNTHETIC)


def test_pictures_without_maps_have_not_changed(tmp_path):
    """Compared with a set from before there were maps."""
    generate(tmp_path, train_images=1, val_images=0, image_size=48, num_classes=3)
    content = (tmp_path / "annotations/instances_train2017.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == INSTANCES_BEFORE
    with Image.open(tmp_path / "train2017/000000000001.jpg") as image:
        # not the bytes, which depend on the version of libjpeg
        assert np.asarray(image).mean(axis=(0, 1)) == pytest.approx(COLOUR_BEFORE, abs=0.1)


def test_generating_needs_no_torch():
    code = "import datasets.synthetic.__main__, sys; sys.exit('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).returncode == 0


# ---- a panoptic set of instances


def derive(source: Path, folder: Path, *flags: str):
    command = ("tools/panoptic_from_instances.py", "--coco_path", str(source), "--output_dir", str(folder))
    return run(sys.executable, *command, *flags)


def square(left: int, top: int, side: int, category: int, **more: object) -> dict:
    right, bottom = left + side, top + side
    polygon = [left, top, right, top, right, bottom, left, bottom]
    box = [left, top, side, side]
    return {"bbox": box, "category_id": category, "segmentation": [polygon], **more}


def crowd(top: int, bottom: int, category: int) -> dict:
    mask = np.zeros((48, 64), np.uint8, order="F")
    mask[top:bottom] = 1
    runs = mask_utils.encode(mask)
    runs["counts"] = runs["counts"].decode()
    box = [0, top, 64, bottom - top]
    return {"bbox": box, "category_id": category, "segmentation": runs, "iscrowd": 1}


def test_smaller_instances_lie_on_larger_ones_and_crowds_below(tmp_path):
    objects = [
        square(10, 10, 4, 2),
        square(8, 8, 16, 1),
        crowd(0, 10, 3),
        crowd(40, 48, 3),
        square(12, 12, 1, 1),
    ]
    write_coco(tmp_path / "data", num_train=2, num_val=1, annotations={0: objects})
    result = derive(tmp_path / "data", tmp_path / "out", "--stuff_name", "ground")
    assert result.returncode == 0, result.stderr
    assert "2 images as train; 3 of 3 instances are visible" in result.stdout

    data = read_panoptic(tmp_path / "out/annotations/panoptic_train2017.json")
    assert [(c["id"], c["name"], c["isthing"]) for c in data.categories] == [
        (1, "one", 1),
        (2, "two", 1),
        (3, "three", 1),
        (4, "ground", 0),
    ]
    ids, segments = data.read(10)
    rows = [(s["category_id"], s["area"], s["iscrowd"]) for s in segments]
    assert rows == [
        (4, 48 * 64 - 18 * 64 - 14 * 16, 0),
        (3, 18 * 64 - 2 * 16, 1),
        (1, 240, 0),
        (2, 15, 0),
        (1, 1, 0),
    ]
    assert ids[12, 12] == segments[4]["id"]
    # an image without objects is all stuff
    assert [(s["category_id"], s["area"]) for s in data.read(11).segments] == [(4, 48 * 64)]
    # images and instances go with it
    assert (tmp_path / "out/train2017/000001.png").exists()
    content = json.loads((tmp_path / "out/annotations/instances_train2017.json").read_text())
    assert len(content["annotations"]) == 5


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"segmentation": []}, (), "annotation 1 has segmentation []; a mask must be"),
        ({"segmentation": "x"}, (), "annotation 1 has segmentation 'x'; a mask must be"),
        ({"segmentation": {"size": [3, 3], "counts": [9]}}, (), "annotation 1 has segmentation"),
        # pycocotools would draw it pixel by pixel, outside of the image too
        ({"segmentation": [[1e9, 1, 5, 5, 9, 1]]}, (), "annotation 1 has segmentation"),
        ({"segmentation": [[1, 1, 5, 5, math.nan, 2]]}, (), "annotation 1 has segmentation"),
        ({}, ("--stuff_name", "two"), "--stuff_name 'two' is a category of instances"),
    ],
)
def test_what_can_not_be_derived_is_one_line(tmp_path, change, flags, message):
    write_coco(tmp_path / "data", num_train=1, annotations={0: [square(1, 1, 9, 1, **change)]})
    result = derive(tmp_path / "data", tmp_path / "out", *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_real_images(tiny_coco, tmp_path):
    result = derive(tiny_coco, tmp_path / "out", "--images", "symlink")
    assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        data = read_panoptic(tmp_path / f"out/annotations/panoptic_{split}2017.json")
        instances = COCO(str(tiny_coco / f"annotations/instances_{split}2017.json"))
        assert list(data.images) == list(instances.imgs)
        for image_id, image in data.images.items():
            read = data.read(image_id)
            assert len(compare(read, read)) == sum(not segment["iscrowd"] for segment in read.segments)
            things = sum(segment["category_id"] in data.things for segment in read.segments)
            assert things <= len(instances.getAnnIds(image_id))
            assert (tmp_path / f"out/{split}2017" / image["file_name"]).exists()


# ---- training and evaluation


@pytest.fixture(scope="module")
def derived(tmp_path_factory) -> Path:
    """A panoptic set of instances: things of two sizes, in every second image a crowd, and stuff."""
    folder = tmp_path_factory.mktemp("derived")
    objects = {i: [square(4 + 2 * i, 6, 20, 1), square(30, 20 + i, 12, 2)] for i in range(6)}
    for i in range(0, 6, 2):
        objects[i].append(crowd(40, 48, 3))
    write_coco(folder / "data", 6, 4, objects)
    panoptic_from_instances.main(
        ["--coco_path", str(folder / "data"), "--output_dir", str(folder / "set"), "--stuff_name", "ground"]
    )
    return folder / "set"


def flags_of(folder: Path) -> list[str]:
    return ["--dataset_file", "coco_panoptic", "--coco_path", str(folder), "--num_workers", "0"]


def raw_map(path: Path) -> np.ndarray:
    """Ids by Pillow alone."""
    with Image.open(path) as image:
        red, green, blue = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    return red + 256 * green + 65536 * blue


@pytest.mark.parametrize("masks", [True, False])
def test_every_segment_is_an_object(derived, synthetic, masks, tmp_path):
    """Beside an independent reading, with the maps beside the JSON file and where DETR has them."""
    published = tmp_path / "published"
    (published / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        name = f"panoptic_{split}"
        shutil.copytree(synthetic / "annotations" / name, published / name)
        shutil.copy(synthetic / f"annotations/{name}.json", published / "annotations")
    places = [(derived, []), (synthetic, ["--coco_panoptic_path", str(published)])]
    same_size = ["--augmentation", "none", "--train_sizes", "48", "--eval_size", "48", "--max_size", "64"]
    for root, extra in places:
        flags = [*flags_of(root), *extra, *same_size, *(["--masks"] if masks else [])]
        if extra and not masks:
            shutil.rmtree(published / "panoptic_train2017")  # it is not read
        dataset = build_dataset("train", parse_config(flags))
        base = published if extra else root
        content = json.loads((base / "annotations/panoptic_train2017.json").read_text())
        kinds = {one["id"]: one["isthing"] for one in content["categories"]}
        assert {dataset.classes.id_of(label) for label in dataset.classes.stuff} == {
            number for number, thing in kinds.items() if not thing
        }
        assert set(dataset.coco.cats) == {number for number, thing in kinds.items() if thing}
        assert dataset.panoptic is None, "training compares nothing"
        for (_, target), annotation in zip(dataset, content["annotations"], strict=True):
            segments = [one for one in annotation["segments_info"] if not one["iscrowd"]]
            labels = [dataset.classes.id_of(label) for label in target["labels"].tolist()]
            assert labels == [one["category_id"] for one in segments]
            height, width = target["orig_size"].tolist()
            sides = torch.tensor([width, height, width, height])
            boxes = box_convert(target["boxes"], "cxcywh", "xywh") * sides
            assert torch.allclose(boxes, torch.tensor([one["bbox"] for one in segments]).float(), atol=1e-3)
            if not masks:
                continue
            folder = published / "panoptic_train2017" if extra else root / "annotations/panoptic_train2017"
            ids = raw_map(folder / annotation["file_name"])
            rows, columns = (
                ((np.arange(new) + 0.5) * old / new).astype(int)
                for new, old in zip(target["size"].tolist(), ids.shape, strict=True)
            )
            for one, mask in zip(segments, target["masks"].numpy(), strict=True):
                assert np.array_equal(mask, (ids == one["id"])[rows][:, columns])


PANOPTIC_RUN = (*SMALL_IMAGES, *SMALL_MODEL[:-2], "--masks", "--device", "cpu", "--augmentation", "none")
# what a network that has learnt little gives
PANOPTIC_RUN += ("--panoptic_score", "0.1", "--panoptic_overlap", "0.1", "--batch_size", "2")
PANOPTIC_RUN += (
    "--epochs",
    "6",
    "--eval_every",
    "6",
    "--save_every",
    "2",
    "--lr",
    "2e-3",
    "--lr_backbone",
    "1e-3",
)


@pytest.fixture(scope="module")
def trained(derived, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    result = run_main_forked(*PANOPTIC_RUN, *flags_of(derived), "--output_dir", str(out))
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"\nstuff   PQ +[\d.]+  SQ +[\d.]+  RQ +[\d.]+  \(1 classes\)\n", result.stdout)
    assert re.search(r"\nbest PQ [\d.]+ \(epoch \d+\): ", result.stdout)
    return out


def quality_in_log(folder: Path) -> dict[str, dict[str, float]]:
    line = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    return {name: line[f"test_{name}"] for name in ("PQ_all", "PQ_th", "PQ_st")}


def quality_of_files(truth: Path, found: Path) -> dict[str, float]:
    """PQ of all, things and stuff by the definition, from JSON files with maps in folders of their names."""
    content, other = json.loads(truth.read_text()), json.loads(found.read_text())
    theirs = {annotation["image_id"]: annotation for annotation in other["annotations"]}
    ious: dict[int, list[float]] = {one["id"]: [] for one in content["categories"]}
    errors = dict.fromkeys(ious, 0)
    for annotation in content["annotations"]:
        ids, segments = raw_map(truth.with_suffix("") / annotation["file_name"]), annotation["segments_info"]
        there = theirs[annotation["image_id"]]
        guess = raw_map(found.with_suffix("") / there["file_name"])
        masks = {one["id"]: guess == one["id"] for one in there["segments_info"]}
        assert {*np.unique(guess).tolist()} - {0} == masks.keys()
        matched = set()
        for one in segments:
            if one["iscrowd"]:
                continue
            mask, best = ids == one["id"], 0.0
            for candidate in there["segments_info"]:
                overlap = masks[candidate["id"]] & mask
                union = (masks[candidate["id"]] & (ids != 0)) | mask
                iou = overlap.sum() / union.sum()
                if candidate["category_id"] == one["category_id"] and iou > 0.5:
                    best = iou
                    matched.add(candidate["id"])
            if best:
                ious[one["category_id"]].append(best)
            else:
                errors[one["category_id"]] += 1
        for candidate in there["segments_info"]:
            kind = candidate["category_id"]
            ignored = ids == 0
            for one in segments:
                if one["iscrowd"] and one["category_id"] == kind:
                    ignored = ignored | (ids == one["id"])
            mask = masks[candidate["id"]]
            if candidate["id"] not in matched and (mask & ignored).sum() <= mask.sum() / 2:
                errors[kind] += 1
    means = {}
    for name, kinds in (("PQ_all", (0, 1)), ("PQ_th", (1,)), ("PQ_st", (0,))):
        chosen = [one["id"] for one in content["categories"] if one["isthing"] in kinds]
        values = [sum(ious[i]) / (len(ious[i]) + errors[i] / 2) for i in chosen if ious[i] or errors[i]]
        means[name] = float(np.mean(values))
    return means


def test_predicted_maps_have_the_quality_of_the_evaluation(trained, derived, tmp_path):
    """Files of predict, read by nothing of the program; and pictures of the maps."""
    annotations = derived / "annotations/panoptic_val2017.json"
    command = ["--resume", trained / "checkpoint.pth", derived / "val2017", "--annotations", annotations]
    command += ["--output_dir", tmp_path / "out", "--device", "cpu", "--batch_size", "2"]
    predict.main([*map(str, command)])
    written = quality_of_files(annotations, tmp_path / "out/panoptic.json")
    logged = {name: one["pq"] for name, one in quality_in_log(trained).items()}
    # prediction fuses norms into convolutions, which moves a pixel here and there
    assert written == pytest.approx(logged, abs=0.01)
    assert written["PQ_st"] > 0.2

    things = {one["category_id"] for one in json.loads((tmp_path / "out/predictions.json").read_text())}
    assert things <= {1, 2, 3}
    picture = Image.open(tmp_path / "out/000000.png")
    assert picture.size == (64 * 8, 48 * 8), "small pictures are enlarged"
    # a black line where segments meet
    ids = raw_map(tmp_path / "out/panoptic/000000000010.png").repeat(8, 0).repeat(8, 1)
    row, column = np.argwhere(ids[:, 1:] != ids[:, :-1])[0]
    assert picture.getpixel((int(column) + 1, int(row))) == (0, 0, 0)


def test_evaluation_in_one_and_two_processes(trained, derived, tmp_path):
    """Equal bits; those of the training's own evaluation, whose thresholds the checkpoint keeps."""
    flags = (*flags_of(derived), "--resume", str(trained / "checkpoint.pth"), "--eval", "--batch_size", "2")
    for processes in (1, 2):
        out = tmp_path / str(processes)
        where = ("--output_dir", str(out), "--device", "cpu")
        run_main_together(*flags, *where, processes=processes, output=tmp_path / f"logs{processes}")
        tables = torch.load(out / "eval.pth", weights_only=True)
        assert {name: tables[name] for name in quality_in_log(trained)} == quality_in_log(trained)


def test_an_interrupted_panoptic_run_goes_on_exactly(trained, derived, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    newest = keep_newest(out, "resume_0005_*.pth")
    flags = (*flags_of(derived), "--output_dir", str(out), "--resume", "auto")
    result = run_main_forked(*PANOPTIC_RUN, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert newest.name in result.stdout
    assert quality_in_log(out) == quality_in_log(trained)


def test_the_report_of_a_panoptic_run(trained, tmp_path):
    report.main([str(trained), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "Panoptic quality" in page
    assert "no mistakes are shown" not in page
    assert epoch_scalars({"test_PQ_th": {"pq": 0.25, "sq": 0.5, "rq": 0.5, "n": 3}}) == {"val/PQ_th": 0.25}


def test_the_check_of_data_knows_panoptic_files(derived, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(derived, root)
    command = ("tools/check_data.py", *flags_of(root), "--masks")
    result = run_forked(*command)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert "ground" in result.stdout
    edit(
        root / "annotations/panoptic_train2017.json",
        lambda content: segment_of(content).update(bbox=[70, 5, 9, 9]),
    )
    result = run_forked(*command)
    assert (result.returncode, "box_outside" in result.stdout) == (1, True), result.stdout


def test_an_image_that_is_not_evaluated_counts_as_missed(synthetic):
    data = read_panoptic(synthetic / "annotations/panoptic_val2017.json")
    truth = PanopticTruth(data, ClassMap.of(data.categories, "auto", ""), 0.3, 0.8, 100)
    empty = {i: compare(data.read(i), Panoptic(np.zeros_like(data.read(i).ids), [])) for i in data.images}
    assert truth.figures({}) == truth.figures(empty)
    perfect = {i: compare(data.read(i), data.read(i)) for i in data.images}
    assert truth.figures(perfect)["PQ_all"]["pq"] == 1
    perfect.popitem()
    assert truth.figures(perfect)["PQ_all"]["pq"] < 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("folder", r"panoptic_val2017 and .*panoptic_val2017 do not exist; one must be the folder of the"),
        ("missing", r"missing panoptic maps of .*: 1, first .*000000000010.png; add them"),
        ("size", r"000000000010.png is 9 x 9 pixels, and its image 64 x 48; take its image out of .* skip"),
        ("kind", r"000000000010.png is a PNG of mode L; a panoptic map must be a PNG of mode RGB"),
        ("void", r"000000000010.png has no pixel of segment \d+, which is listed; take"),
        (
            "thing",
            r"panoptic_val2017.json has category 4 'ground' as a thing, and for the detector it is stuff",
        ),
        ("json", r"panoptic_val2017.json can't be read .* check --coco_panoptic_path"),
    ],
)
def test_faulty_panoptic_data_are_named(derived, tmp_path, fault, message):
    root = tmp_path / "set"
    shutil.copytree(derived, root)
    path = root / "annotations/panoptic_val2017.json"
    first, classes = path.with_suffix("") / "000000000010.png", None
    if fault == "folder":
        shutil.rmtree(path.with_suffix(""))
    elif fault == "missing":
        first.unlink()
    elif fault == "json":
        path.unlink()
    elif fault == "thing":
        classes = build_dataset("val", parse_config(flags_of(root))).classes
        edit(path, lambda content: content["categories"][-1].update(isthing=1))
    else:
        mode, side = {"size": ("RGB", (9, 9)), "kind": ("L", (64, 48)), "void": ("RGB", (64, 48))}[fault]
        Image.new(mode, side).save(first)
    with pytest.raises(UserError, match=message) as error:
        build_dataset("val", parse_config([*flags_of(root), "--masks"]), classes)[0]
    assert "\n" not in str(error.value)


def test_what_is_stuff_is_kept_with_the_classes(trained):
    classes = load_detector(trained / "checkpoint.pth").classes
    assert (classes.stuff, classes.name_of(classes.stuff[0])) == ((3,), "ground")
    assert ClassMap.from_plain(classes.to_plain()) == classes
    for wrong in ([4], ["a"], 3, [[1]]):
        with pytest.raises(ValueError, match="no classes"):
            ClassMap.from_plain(classes.to_plain() | {"stuff": wrong})
