"""tools/report.py: the numbers behind the page are COCO's own, mistakes are sorted as in TIDE, and
what lacks is said.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco_format import read_annotations
from datasets.detection_errors import FALSE_POSITIVES, average_precision, find_errors
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, run
from tests.processes import run_main_forked
from tests.report_runs import CATEGORIES, detections_of, log_row, write_data, write_run
from tools import report
from tools.report_page import content
from tools.report_page.make import GroundTruth, page_content, write_page
from tools.report_page.masks import MaskPairs, outline, worst_masks
from tools.report_page.mistakes import Album, found_score, missed, view_of, worst
from tools.report_page.runs import read_runs
from util.checkpoint import read_checkpoint, write_atomically
from util.draw.curves import PANELS
from util.errors import UserError
from util.run.record import KEPT_STARTS, read_record, write_record

IMAGE = (200.0, 200.0)


def coco_of(objects: list[tuple], images: int = 1) -> COCO:
    """objects: image, category, box and, if it is one, "crowd"."""
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": i + 1, "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in range(images)
        ],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": len(crowd),
            }
            for i, (image, category, box, *crowd) in enumerate(objects)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def found(*detections: tuple) -> list[dict]:
    return [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in detections]


def coco_eval(coco: COCO, results: list[dict], category: int | None = None) -> COCOeval:
    """pycocotools by itself, on annotations numbered from 1, for one category alone if wanted."""
    numbered = COCO()
    numbered.dataset = {
        **coco.dataset,
        "annotations": [{**a, "id": i} for i, a in enumerate(coco.dataset["annotations"], 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        numbered.createIndex()
        evaluation = COCOeval(numbered, numbered.loadRes([dict(r) for r in results]), "bbox")
        evaluation.params.catIds = evaluation.params.catIds if category is None else [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Two runs on the same data, the second with averaged weights."""
    folder, coco = tmp_path_factory.mktemp("runs"), read_annotations(data)
    plain = write_run(folder / "plain", data, detections_of(coco, 1))
    other = write_run(
        folder / "batchformer", data, detections_of(coco, 2, noise=3), 6, "--bf", "1", "--insert_idx", "0"
    )
    write_run(other, data, detections_of(coco, 3), prefix="ema_")
    return plain, other


def page_data(*folders, annotations=None, images=None, num_pictures=3, threshold=0.3) -> dict:
    notes: list[str] = []
    runs = read_runs(folders)
    notes += [f"{run.name}: {note}." for run in runs for note in run.notes]
    return page_content(
        runs, GroundTruth.find(runs, annotations, images, notes), notes, num_pictures, threshold
    )


def curve(told: dict, title: str, name: str) -> dict[float, float]:
    """Values by epoch of the first run's line `name` in the panel `title`."""
    axis = f"x{1 + panels(told).index(title)}".removesuffix("1")
    lines = [
        line for line in told["curves"]["data"] if line["meta"] == 0 and line["name"].endswith(f" · {name}")
    ]
    line = next(line for line in lines if line["xaxis"] == axis)
    return dict(zip(line["x"], line["y"], strict=True))


def panels(told: dict) -> list[str]:
    return [re.match("<b>(.*)</b>", note["text"])[1] for note in told["curves"]["layout"]["annotations"]]


# ---- mistakes


BOX, FAR = [10, 10, 40, 40], [100, 100, 50, 50]


@pytest.mark.parametrize(
    ("kind", "objects", "detections"),
    [
        ("correct", [(1, 3, BOX)], [(1, 3, [10, 10, 40, 30], 0.9)]),
        ("class", [(1, 3, BOX)], [(1, 17, [10, 10, 40, 30], 0.9)]),
        ("localisation", [(1, 3, BOX)], [(1, 3, [30, 10, 40, 40], 0.9)]),
        ("both", [(1, 3, BOX)], [(1, 17, [30, 10, 40, 40], 0.9)]),
        ("duplicate", [(1, 3, BOX)], [(1, 3, [11, 10, 40, 40], 0.8), (1, 3, BOX, 0.9)]),
        ("background", [(1, 3, BOX)], [(1, 3, [120, 120, 40, 40], 0.9)]),
        ("background", [(1, 3, BOX)], [(1, 17, [48, 48, 40, 40], 0.9)]),
        ("background", [], [(1, 3, BOX, 0.9)]),
        ("ignored", [(1, 3, BOX, "crowd")], [(1, 3, [12, 12, 20, 20], 0.9)]),
        ("background", [(1, 3, BOX, "crowd")], [(1, 17, [12, 12, 20, 20], 0.9)]),
    ],
)
def test_a_mistake_has_its_kind(kind, objects, detections):
    errors = find_errors(coco_of(objects), found(*detections))
    wanted = detections[0][3]
    (place,) = np.flatnonzero(errors.detections.score == wanted)
    assert errors.detections.kind[place] == kind
    assert (errors.detections.object[place] >= 0) == (kind not in ("background", "ignored"))


@pytest.mark.parametrize(
    ("objects", "detections", "costs"),
    [
        ([(1, 3, BOX)], [(1, 17, BOX, 0.9)], {"class": 1.0}),
        ([(1, 3, BOX)], [(1, 3, [30, 10, 40, 40], 0.9)], {"localisation": 1.0}),
        ([(1, 3, BOX)], [(1, 3, [100, 100, 20, 20], 0.9), (1, 3, BOX, 0.8)], {"background": 0.5}),
        (
            [(1, 3, BOX), (1, 3, FAR)],
            [(1, 3, BOX, 0.9), (1, 3, [11, 9, 40, 40], 0.8), (1, 3, FAR, 0.7)],
            {"duplicate": 50 / 303},
        ),
        ([(1, 3, BOX), (1, 3, FAR)], [(1, 3, BOX, 0.9)], {"missed": 1 - 51 / 101}),
        (
            [(1, 3, BOX)],
            [(1, 17, [30, 10, 40, 40], 0.9), (1, 3, BOX, 0.8)],
            {},
        ),  # of a class without objects: costs nothing
        (
            [(1, 3, BOX)],
            [(1, 17, BOX, 0.9), (1, 3, BOX, 0.8)],
            {},
        ),  # the object is found: the wrong class has nothing to put right
    ],
)
def test_a_kind_costs_what_putting_it_right_gives(objects, detections, costs):
    told = find_errors(coco_of(objects), found(*detections)).costs()
    assert {kind: cost for kind, cost in told.items() if cost} == pytest.approx(costs)


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_coco_s(data, seed):
    """With ties of scores, crowds and missing classes; the AP50 that the costs start from is
    pycocotools'.
    """
    coco = read_annotations(data)
    results = detections_of(coco, seed)
    errors, evaluation = find_errors(coco, results), coco_eval(coco, results)
    assert errors.average_precision() == pytest.approx(evaluation.stats[1], abs=1e-12)
    images = [e for e in evaluation.evalImgs if e and e["aRng"] == evaluation.params.areaRng[0]]
    counted = sum(len(e["dtIds"]) for e in images)
    right = sum(int(((e["dtMatches"][0] > 0) & ~e["dtIgnore"][0].astype(bool)).sum()) for e in images)
    assert len(errors.detections.score) == counted
    assert (errors.detections.kind == "correct").sum() == right == (errors.objects.found_by >= 0).sum()
    assert set(errors.detections.kind) <= {*FALSE_POSITIVES, "correct", "ignored"}
    assert all(0 <= cost <= 1 for cost in errors.costs().values())


def test_average_precision_of_nothing():
    assert average_precision(np.array([]), np.array([], dtype=bool), 0) == 0
    assert average_precision(np.array([]), np.array([], dtype=bool), 3) == 0
    assert find_errors(coco_of([]), found((1, 3, BOX, 0.5))).costs()["missed"] == 0


def test_masks_and_their_outlines(tmp_path):
    """Two objects found with known masks: their IoU, the worst first, and paths around the pixels."""
    coco, masks = coco_of([(1, 3, BOX), (1, 3, FAR)]), np.zeros((4, 200, 200), np.uint8)
    masks[0, 10:50, 10:50] = masks[1, 100:150, 100:150] = masks[2, 12:50, 10:50] = 1
    masks[3, 100:150, 90:130] = 1
    masks[3, 110:120, 110:120] = 0  # a hole
    runs = [mask_utils.encode(np.asfortranarray(mask)) for mask in masks]
    plain = [{"size": one["size"], "counts": one["counts"].decode()} for one in runs]
    for annotation, segmentation in zip(coco.dataset["annotations"], plain[:2], strict=True):
        annotation["segmentation"] = segmentation
    detections = found((1, 3, BOX, 0.9), (1, 3, FAR, 0.8), (1, 17, FAR, 0.9))
    for detection, segmentation in zip(detections, [*plain[2:], plain[3]], strict=True):
        detection["segmentation"] = segmentation
    errors = find_errors(coco, detections)
    pairs = MaskPairs(errors, coco, tmp_path, 0.3)
    first, second = worst_masks([errors], [pairs], coco, Album(None, coco), 5)
    assert [first["iou"], second["iou"]] == [round(1400 / 3000, 3), 0.95]
    assert first["object"]["box"] == FAR and first["detection"]["score"] == 0.8
    assert worst_masks([errors], [MaskPairs(errors, coco, tmp_path, 0.85)], coco, Album(None, coco), 5) == [
        second
    ]

    # corners are cut by half a pixel
    paths = re.findall(r"M([^Z]+)Z", first["detection"]["outline"])
    polygons = [np.array([point.split() for point in path.split("L")], float) for path in paths]
    extents = sorted([*polygon.min(0), *polygon.max(0)] for polygon in polygons)
    assert extents == [[90, 100, 130, 150], [110, 110, 120, 120]]
    assert sum(len(polygon) for polygon in polygons) == 16
    large = np.zeros((3000, 4000), np.uint8)
    large[1000:2000, 500:1500] = 1
    (path,) = re.findall(r"M([^Z]+)Z", outline(large, (0, 0, 4000, 3000)))
    corners = np.array([point.split() for point in path.split("L")], float)
    assert [*corners.min(0), *corners.max(0)] == pytest.approx([500, 1000, 1500, 2000], abs=10)

    # of a file that somebody has edited
    errors.detections.segmentation[0] = {"size": [7, 7], "counts": "0"}
    with pytest.raises(UserError, match="its detections: a detection of image 1 .* no worst masks"):
        MaskPairs(errors, coco, tmp_path, 0.3)


# ---- classes and curves


def test_figures_of_a_class_are_pycocotools_own(data):
    """Each class evaluated alone, by pycocotools, gives what the table says of it."""
    coco = read_annotations(data)
    results = detections_of(coco, 5)
    run_folder = write_run(data.parent.parent.parent / "single", data, results)
    (one,) = read_runs([run_folder])
    figures = content.class_metrics(one.results[0].tables, [*CATEGORIES])
    place = {"AP": 0, "AP50": 1, "AP75": 2, "AP small": 3, "AP medium": 4, "AP large": 5, "AR 100": 8}
    for i, category in enumerate(CATEGORIES):
        stats = coco_eval(coco, results, category).stats
        for name, values in figures.items():
            expected = stats[place[name]]
            assert values[i] == (None if expected < 0 else pytest.approx(expected, abs=1e-6)), (
                category,
                name,
            )


def test_precision_by_recall_is_the_table_s(made):
    told = page_data(*made)["pr"]
    assert [name for name, _ in told["choices"]] == ["all classes", *sorted(CATEGORIES.values())]
    (one, _) = read_runs(made)
    tables, recall = one.results[0].tables, np.linspace(0, 100, 101)
    for panel, (ious, stat) in enumerate([(slice(0, 1), 1), (slice(5, 6), 2), (slice(None), 0)]):
        place = panel * 3  # of the first of three results
        assert (
            told["data"][place]["x"] == recall.tolist()
            and told["data"][place]["y"] == told["choices"][0][1][place]
        )
        assert np.mean(told["data"][place]["y"]) == pytest.approx(100 * tables.stats[stat], abs=0.05)
        for name, values in told["choices"][1:]:
            k = [CATEGORIES[i] for i in tables.category_ids].index(name)
            assert values[place] == pytest.approx(
                100 * tables.precision[ious, :, k, 0, -1].mean(0), abs=0.051
            )


def test_curves_of_a_resumed_run_with_gaps(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "run")
    rows = [
        log_row(0),
        log_row(1, [0.25, *[-1.0] * 11]),
        log_row(1, [0.5, *[-1.0] * 11]),
        log_row(2, train_loss=float("nan")),
        log_row(3, test_ema_coco_eval_bbox=[0.125] * 12),
    ]
    (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 4, "trai')
    told = page_data(folder)
    assert curve(told, "Average precision", "AP") == {1: 50}
    assert curve(told, "Average precision", "AP averaged") == {3: 12.5}
    assert curve(told, "Total loss", "training") == {0: 10, 1: 5, 3: 2.5}
    assert panels(told) == [panel.title for panel in PANELS if panel.title != "AP by size"]
    assert told["runs"][0]["best"] == {"AP": 0.5, "epoch": 1}


def test_the_chart_has_the_lines_of_every_run(made):
    chart = page_data(*made)["curves"]
    lines = [line for line in chart["data"] if line.get("xaxis") == "x"]
    assert [(line["meta"], line["name"], line["line"]["dash"], len(line["x"])) for line in lines] == [
        (0, "plain · AP", "solid", 6),
        (0, "plain · AP50", "dash", 6),
        (1, "batchformer · AP", "solid", 6),
        (1, "batchformer · AP50", "dash", 6),
    ]
    assert [line["name"] for line in chart["data"] if line.get("showlegend") is None] == [
        "plain",
        "batchformer",
    ]
    assert len({(line["legendgroup"], line["line"]["color"]) for line in chart["data"]}) == 2
    assert chart["layout"]["yaxis9"]["type"] == "log" and "type" not in chart["layout"]["yaxis"]


# ---- the page's content


def test_everything_is_there_of_two_runs(made):
    told = page_data(*made)
    assert told["notes"] == []
    assert [r["name"] for r in told["results"]] == ["plain", "batchformer", "batchformer (averaged)"]
    for result, folder, prefix in zip(
        told["results"], (made[0], made[1], made[1]), ("", "", "ema_"), strict=True
    ):
        assert result["stats"] == read_checkpoint(folder / "eval" / f"{prefix}latest.pth")["stats"]
    assert told["runs"][1]["batch"] == "16" and told["runs"][1]["environment"]["device_name"] == "Some GPU"
    differ = {flag["name"] for flag in told["flags"] if flag["differs"]}
    assert differ == {"bf", "insert_idx", "output_dir"}
    assert [one["name"] for one in told["classes"]["classes"]] == [*CATEGORIES.values()]
    json.dumps(told, allow_nan=False)


def test_what_later_starts_changed_is_said(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "changed")
    flags = read_record(folder)["flags"]
    for lr, size, processes in ((1e-4, 2, 3), (1e-4, 2, 4), (5e-5, 1, 4)):
        new = {"lr": lr, "batch_size": size, "resume": f"{lr}.pth"}
        write_record(folder, {"flags": flags | new}, {"processes": processes}, {"epoch": 3})
    (told,) = page_data(folder)["runs"]
    assert told["changed"] == "--lr 0.0002, then 0.0001, then 5e-05; --batch_size 2, then 1"
    assert told["batch"] == "16, then 6, then 8, then 4" and told["continued"] == 3
    assert page_data(made[0])["runs"][0]["changed"] == ""


def test_the_worst_come_first_and_are_what_they_say(made, data):
    coco = read_annotations(data)
    results = detections_of(coco, 1)
    errors, album = find_errors(coco, results), Album(data.parent.parent / "val2017", coco)
    entries = worst([errors], coco, album, 0.3, 100)
    wrong = np.isin(errors.detections.kind, FALSE_POSITIVES) & (errors.detections.score >= 0.3)
    shown = [entry for entry in entries if entry["kind"] != "missed"]
    assert len(shown) == wrong.sum() > 5
    for kind in FALSE_POSITIVES:
        scores = [entry["detection"]["score"] for entry in shown if entry["kind"] == kind]
        assert scores == sorted(scores, reverse=True)
    misses = [entry for entry in entries if entry["kind"] == "missed"]
    areas = [entry["object"]["box"][2] * entry["object"]["box"][3] for entry in misses]
    assert areas == sorted(areas, reverse=True) and len(areas) == missed(errors, 0.3).sum() > 0
    assert all(entry["found_with"] is None or entry["found_with"] < 0.3 for entry in misses)
    assert all(entry["picture"] is not None for entry in entries)
    crowd = next(a for a in coco.anns.values() if a["iscrowd"])
    assert not any(
        entry["image"] == crowd["image_id"] and entry["object"]["box"] == crowd["bbox"] for entry in misses
    )


def test_objects_found_below_the_threshold_are_missed():
    errors = find_errors(coco_of([(1, 3, BOX), (1, 3, [100, 100, 30, 30])]), found((1, 3, BOX, 0.2)))
    assert missed(errors, 0.3).tolist() == [True, True] and missed(errors, 0.2).tolist() == [False, True]
    assert found_score(errors)[0] == 0.2 and np.isnan(found_score(errors)[1])


def test_other_runs_are_asked_about_the_same_mistake(tmp_path):
    coco = coco_of([(1, 3, BOX)])
    mistaken = find_errors(coco, found((1, 17, BOX, 0.9)))
    likewise = find_errors(coco, found((1, 17, [12, 10, 40, 40], 0.6)))
    good = find_errors(coco, found((1, 3, BOX, 0.8)))
    entries = worst([mistaken, likewise, good], coco, Album(None, coco), 0.3, 1)
    (confusion,) = [entry for entry in entries if entry["kind"] == "class" and entry["result"] == 0]
    assert [other["text"] for other in confusion["others"]] == ["made it too (0.60)", "did not make it"]
    (miss,) = [entry for entry in entries if entry["kind"] == "missed" and entry["result"] == 0]
    assert [other["text"] for other in miss["others"]] == ["missed it too", "found it (0.80)"]


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 200, 200],
        [0, 0, 1, 1],
        [199, 199, 1, 1],
        [90, 10, 4, 180],
        [5, 5, 190, 2],
        [-5, -5, 20, 20],
    ],
)
@pytest.mark.parametrize("size", [IMAGE, (200.0, 210.0), (2000.0, 300.0)])
def test_a_view_has_the_box_and_lies_in_the_image(box, size):
    left, top, width, height = view_of(np.array([box], dtype=float), size)
    assert left >= 0 and top >= 0 and left + width <= size[0] and top + height <= size[1]
    assert left <= max(box[0], 0) and top <= max(box[1], 0)
    assert left + width >= min(box[0] + box[2], size[0]) and top + height >= min(box[1] + box[3], size[1])


def test_a_real_run_and_an_evaluation_by_itself(trained_run, tmp_path):
    alone = tmp_path / "alone"
    data = ["--coco_path", str(trained_run.parent / "data"), "--batch_size", "2", "--num_workers", "0"]
    flags = [*data, *SMALL_IMAGES, *SMALL_MODEL, "--eval", "--save_predictions", "--output_dir", str(alone)]
    result = run_main_forked(*flags, "--resume", str(trained_run / "checkpoint.pth"))
    assert result.returncode == 0, result.stderr
    told = page_data(trained_run, alone, threshold=0.0)
    assert told["notes"] == []
    evaluation = told["runs"][1]
    assert evaluation["evaluated"] == str(trained_run / "checkpoint.pth") and evaluation["batch"] is None
    assert not [flag["name"] for flag in told["flags"] if flag["differs"]]
    assert next(flag["values"][1] for flag in told["flags"] if flag["name"] == "lr") == ""
    last = json.loads((trained_run / "log.txt").read_text().splitlines()[-1])
    ours, averaged, evaluated, _ = (result["stats"] for result in told["results"])
    assert ours == evaluated == last["test_coco_eval_bbox"] and averaged == last["test_ema_coco_eval_bbox"]
    assert curve(told, "Total loss", "training")[last["epoch"]] == pytest.approx(last["train_loss"], rel=1e-5)
    assert [one["name"] for one in told["classes"]["classes"]] == ["one", "two", "three"]
    assert told["runs"][0]["continued"] == 1 and told["runs"][0]["of"] == 3 == told["runs"][0]["epochs"]
    assert told["mistakes"]["entries"] and all(
        entry["picture"] is not None for entry in told["mistakes"]["entries"]
    )


# ---- what lacks


def test_a_run_that_has_only_begun(made, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(made[0] / "run.json", folder)
    told = page_data(folder, made[0])
    assert any("begun: has no log.txt yet" in note for note in told["notes"])
    assert any("begun: has not been evaluated yet" in note for note in told["notes"])
    assert told["runs"][0]["epochs"] == 0 and len(told["results"]) == 1


def test_a_run_without_an_evaluation(made, tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "log.txt").write_text(json.dumps(log_row(0)) + "\n")
    told = page_data(folder)
    assert told["results"] == [] and curve(told, "Total loss", "training") == {0: 10}
    assert any("no run.json and no checkpoint" in note for note in told["notes"])


def test_flags_of_a_run_without_a_record_are_its_checkpoint_s(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "old")
    flags = read_record(folder)["flags"]
    (folder / "run.json").unlink()
    write_atomically({"model": {}, "args": flags}, folder / "checkpoint.pth")
    told = page_data(folder)
    assert {flag["name"] for flag in told["flags"]} == set(flags)
    assert any("checkpoint.pth" in note for note in told["notes"])
    assert told["mistakes"]["entries"], "the data is found by --coco_path"


def test_missing_images_and_annotations_are_said(made, tmp_path, data):
    folder = shutil.copytree(made[0], tmp_path / "moved")
    record = read_record(folder)
    record["data"]["val"] = {"images": "/nowhere/val", "annotations": "/nowhere/val.json"}
    (folder / "run.json").write_text(json.dumps(record))
    told = page_data(folder)
    assert any("/nowhere/val.json is not there" in note and "--annotations" in note for note in told["notes"])
    assert told["mistakes"]["entries"] == [] and told["classes"]["values"][0] is not None
    told = page_data(folder, annotations=data)
    assert any("--images" in note for note in told["notes"])
    assert told["mistakes"]["entries"] and all(
        entry["picture"] is None for entry in told["mistakes"]["entries"]
    )
    told = page_data(folder, annotations=data, images=data.parent.parent / "val2017")
    assert told["notes"] == [] and told["mistakes"]["entries"][0]["picture"] is not None


def test_unreadable_images_cost_their_pictures_only(made, data, tmp_path):
    images = shutil.copytree(data.parent.parent / "val2017", tmp_path / "images")
    for file in sorted(images.iterdir())[:6]:
        file.write_bytes(b"no picture")
    told = page_data(*made, images=images, annotations=data, num_pictures=50)
    pictures = [entry["picture"] for entry in told["mistakes"]["entries"]]
    assert None in pictures and any(picture is not None for picture in pictures)
    assert any("can't be read" in note for note in told["notes"])


def test_broken_files_of_an_evaluation_are_said(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "broken")
    (folder / "eval" / "latest.json").write_text("[{")
    (folder / "eval" / "latest.pth").write_bytes(b"nothing")
    told = page_data(folder)
    assert sum("latest." in note for note in told["notes"]) >= 2
    assert told["results"][0]["stats"] is not None, "the log still has the figures"


@pytest.mark.parametrize(
    "record",
    [
        {"flags": 3, "data": [], "environment": "x", "starts": [1, {"at": 2}], "classes": []},
        {
            "flags": {"epochs": "many", "batch_size": None},
            "data": {"val": 7},
            "environment": {"processes": "two"},
            "classes": {"a": 1},
            "starts": {},
        },
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"epoch": "one"},
        {"train_loss": 1},
        {"epoch": 7, "train_loss": "low", "n_parameters": "all"},
        {"epoch": 7, "test_coco_eval_bbox": [None] * 12},
        {"epoch": 7, "test_coco_eval_bbox": [0.5]},
        {"epoch": float("nan")},
        {"epoch": True},
    ],
)
def test_edited_files_cost_what_they_say_at_most(made, tmp_path, record, row):
    folder = shutil.copytree(made[0], tmp_path / "edited")
    (folder / "run.json").write_text(json.dumps(record))
    with open(folder / "log.txt", "a") as log:
        log.write(json.dumps(row) + "\n" + json.dumps(log_row(8)) + "\n")
    told = page_data(folder)
    assert curve(told, "Total loss", "training")[8] == pytest.approx(10 / 9, rel=1e-5)
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [1, 2, 3]},
        {"bbox": None},
        {"score": "high"},
        {"image_id": [1]},
        {"category_id": 1.5},
    ],
)
def test_detections_in_another_format_are_said(made, tmp_path, change):
    folder = shutil.copytree(made[0], tmp_path / "odd")
    results = json.loads((folder / "eval" / "latest.json").read_text())
    (folder / "eval" / "latest.json").write_text(json.dumps([{**results[0], **change}]))
    told = page_data(folder)
    assert (
        any("not in COCO's results format" in note for note in told["notes"])
        and told["mistakes"]["entries"] == []
    )


def test_detections_alone_give_the_tables_too(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "untabled")
    stats = read_checkpoint(folder / "eval" / "latest.pth")["stats"]
    (folder / "eval" / "latest.pth").unlink()
    (folder / "log.txt").unlink()
    told = page_data(folder)
    assert told["results"][0]["stats"] == stats and told["classes"]["values"][0] is not None


def test_tables_and_detections_of_different_evaluations_are_said(made, tmp_path, data):
    folder = shutil.copytree(made[0], tmp_path / "mixed")
    (folder / "eval" / "latest.json").write_text(json.dumps(detections_of(read_annotations(data), 9)))
    assert any("different evaluations" in note for note in page_data(folder)["notes"])


def test_runs_on_other_annotations_are_not_compared(made, tmp_path):
    other = write_data(tmp_path / "other", images=9)
    folder = write_run(tmp_path / "elsewhere", other, detections_of(read_annotations(other), 4))
    told = page_data(made[0], folder)
    assert any("elsewhere: was evaluated on other annotations" in note for note in told["notes"])
    assert {entry["result"] for entry in told["mistakes"]["entries"]} == {0}


def test_scores_below_the_threshold_are_said(made):
    told = page_data(*made, threshold=1.0)
    said = [note for note in told["notes"] if "lower --score_threshold" in note]
    assert [note.split(": ")[0] for note in said] == [result["name"] for result in told["results"]]


# ---- the file


def test_pictures_stay_within_their_room(made, data, monkeypatch):
    monkeypatch.setattr("tools.report_page.mistakes.PICTURE_BYTES", 60_000)
    told = page_data(*made, num_pictures=50)
    assert sum(map(len, told["mistakes"]["pictures"])) < 60_000 + 100_000
    assert any("Not all pictures fitted" in note for note in told["notes"])


def test_names_never_end_the_script(made, tmp_path):
    write_page(page_data(*made), "<b>a</b> {{data}}", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 3 and "<b>" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_the_command_makes_the_page(made, tmp_path, capsys):
    output = tmp_path / "new" / "report.html"
    report.main([*map(str, made), "--output", str(output), "--num_pictures", "2"])
    assert output.stat().st_size < 3e6 and str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num_pictures", "-1"], "--num_pictures -1"),
        (["--score_threshold", "2"], "--score_threshold: 2 must be"),
        (["--score_threshold", "half"], "--score_threshold: invalid score value: 'half'"),
        (["--annotations", "/no/such.json"], "/no/such.json"),
        (["--images", "/no/such"], "--images /no/such"),
        (["--output", "/proc/no/report.html"], "--output /proc/no/report.html"),
    ],
)
def test_a_wrong_flag_is_named(made, tmp_path, more, told):
    with pytest.raises(UserError, match=told) as caught:
        report.main([str(made[0]), "--output", str(tmp_path / "page.html"), *more])
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_named(made, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = (
        ([tmp_path / "absent"], "absent"),
        ([tmp_path / "empty"], "holds nothing of a run"),
        ([made[0], made[0]], "twice"),
    )
    for folders, told in cases:
        with pytest.raises(UserError, match=told):
            read_runs(folders)


def test_a_mistake_ends_the_command_with_one_line(tmp_path):
    result = run("python", "tools/report.py", str(tmp_path / "absent"))
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        report.main(["--help"])
    told = capsys.readouterr().out
    assert "example:" in told and "(default: 12)" in told and "SUPPRESS" not in told


# ---- run.json


def test_a_resumed_run_keeps_its_first_start(tmp_path):
    write_record(tmp_path, {"flags": {"lr": 1.0, "epochs": 2}}, {"torch": "1"}, {"epoch": 0})
    write_record(tmp_path, {"flags": {"lr": 1.0, "epochs": 4}}, {"torch": "2"}, {"epoch": 2})
    record = read_record(tmp_path)
    assert record["flags"]["epochs"] == 4 and record["environment"] == {"torch": "2"}
    assert [start["epoch"] for start in record["starts"]] == [0, 2]
    assert (
        record["starts"][1]["changed_flags"] == {"epochs": 2} and "changed_flags" not in record["starts"][0]
    )


def test_the_record_stays_small(tmp_path):
    for epoch in range(KEPT_STARTS + 5):
        write_record(tmp_path, {}, {}, {"epoch": epoch})
    starts = [start["epoch"] for start in read_record(tmp_path)["starts"]]
    assert len(starts) == KEPT_STARTS + 1 and starts[0] == 0 and starts[-1] == KEPT_STARTS + 4


@pytest.mark.parametrize("broken", ["{", "[1]", '{"starts": 3, "flags": 4}', ""])
def test_a_broken_record_is_written_anew(tmp_path, broken):
    (tmp_path / "run.json").write_text(broken)
    write_record(tmp_path, {"flags": {"lr": 1.0}}, {}, {"epoch": 0})
    assert read_record(tmp_path)["flags"] == {"lr": 1.0}


def test_a_record_that_can_t_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / ".run.json.tmp").mkdir()
    write_record(tmp_path, {}, {}, {"epoch": 0})
    assert "training continues" in caplog.text and read_record(tmp_path) == {}


def test_thumbnails_are_of_the_place(made, data):
    """The cutting shows what the boxes are about: its colours are those of the image there."""
    coco = read_annotations(data)
    flat = data.parent.parent / "flat"
    flat.mkdir(exist_ok=True)
    for image in coco.imgs.values():
        picture = Image.new("RGB", (image["width"], image["height"]), (0, 0, 200))
        picture.paste((200, 0, 0), (0, 0, image["width"] // 2, image["height"]))
        picture.save(flat / image["file_name"])
    album = Album(flat, coco)
    left, right = (0.0, 0.0, 40.0, 30.0), (120.0, 80.0, 40.0, 30.0)
    assert [album.cutting(1, view) for view in (left, right, left)] == [0, 1, 0], "each once"
    for uri, colour in zip(album.uris, ((200, 0, 0), (0, 0, 200)), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as cut:
            assert cut.size == (40, 30)
            assert np.abs(np.asarray(cut.getpixel((20, 15))) - colour).max() < 12


def test_a_toy_run_shows_what_its_ap_rests_on(made, tmp_path):
    """Images and epochs, as far as they are known."""
    plain, other = (run["basis"] for run in page_data(*made)["runs"])
    assert plain == other == "6 epochs of 100 images, evaluated on 12"
    folder = shutil.copytree(made[0], tmp_path / "unknown")
    (folder / "run.json").unlink()
    assert page_data(folder)["runs"][0]["basis"] == "6 epochs"
    (folder / "log.txt").unlink()
    assert page_data(folder)["runs"][0]["basis"] == ""
