"""From a folder of images with boxes to a fine-tuned detector, its report and annotated pictures,
as docs/own_data.md has it.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.synthetic.write import generate
from tests import layouts
from tests.helpers import SMALL_IMAGES, SMALL_MODEL
from tests.processes import run_forked, run_main_forked

IDS = {1: 1000, 2: 3, 3: 17}  # of the generated categories
FAST = (*SMALL_MODEL[:-2], "--num_queries", "30", *SMALL_IMAGES, "--num_workers", "0")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What a user has: images with boxes, and a checkpoint that knows these classes and others."""
    folder = tmp_path_factory.mktemp("given")
    shapes = {"workers": 1, "image_size": 96, "max_objects": 3}
    generate(folder / "small", train_images=24, val_images=8, num_classes=3, seed=1, **shapes)
    for path in (folder / "small/annotations").iterdir():
        content = json.loads(path.read_text())
        for entry in content["categories"]:
            entry["id"] = IDS[entry["id"]]
        for entry in content["annotations"]:
            entry["category_id"] = IDS[entry["category_id"]]
        path.write_text(json.dumps(content))
    layouts.write_labelled(folder / "small", folder / "coco")
    generate(folder / "other", train_images=8, val_images=4, num_classes=5, seed=2, **shapes)
    flags = (
        "--coco_path",
        str(folder / "other"),
        *FAST,
        "--epochs",
        "1",
        "--output_dir",
        str(folder / "trained"),
    )
    result = run_main_forked(*flags)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_folder_of_images_becomes_a_detector_a_report_and_pictures(given, tmp_path):
    """The architecture is the checkpoint's: no flag names it again."""
    data, out = tmp_path / "mine", tmp_path / "exps"
    done = command("convert_dataset.py", given / "coco", "--output_dir", data)
    assert "3 classes" in done
    done = command(
        "finetune.py",
        "--coco_path",
        data,
        "--finetune",
        given / "trained/checkpoint.pth",
        "--output_dir",
        out,
        "--epochs",
        "6",
        "--lr",
        "1e-3",
        "--eval_every",
        "6",
        *SMALL_IMAGES,
        "--num_workers",
        "0",
    )
    assert "3 of 3 classes copied by name" in done
    assert done.splitlines()[-1] == f"{out / 'report.html'}: open it in a browser"
    annotations = data / "annotations/instances_val2017.json"
    ids = {category["id"]: category["name"] for category in json.loads(annotations.read_text())["categories"]}
    assert set(ids) == set(IDS.values())

    results = out / "eval/latest.json"
    assert {result["category_id"] for result in json.loads(results.read_text())} <= set(ids)
    last = json.loads((out / "log.txt").read_text().splitlines()[-1])
    assert last["test_coco_eval_bbox"] == figures_by_hand(annotations, results)
    assert max(last["test_coco_eval_bbox"]) > 0, "nothing was learned, so nothing was compared"

    page = (out / "report.html").read_text()
    assert all(name in page for name in ids.values())

    command(
        "predict.py",
        "--resume",
        out / "checkpoint.pth",
        data / "val2017",
        "--output_dir",
        tmp_path / "pictures",
        "--score_threshold",
        "0.01",
    )
    images = sorted(path.stem for path in (data / "val2017").iterdir())
    drawn = [path for path in (tmp_path / "pictures").rglob("*") if path.suffix in (".jpg", ".png")]
    assert sorted(path.stem for path in drawn) == images
    for path in drawn:
        Image.open(path).verify()
    predictions = json.loads((tmp_path / "pictures/predictions.json").read_text())
    assert predictions
    assert {prediction["category_id"] for prediction in predictions} <= set(ids)


def test_real_images_of_three_classes(tiny_coco, tmp_path):
    """person, car and dog of COCO, under COCO's ids."""
    data = tmp_path / "mine"
    command(
        "subset_coco.py",
        "--coco_path",
        tiny_coco,
        "--split",
        "both",
        "--classes",
        "person",
        "car",
        "dog",
        "--drop_empty",
        "--output_dir",
        data,
    )
    assert "problems: 0" in command("check_data.py", "--coco_path", data)
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    assert {category["id"] for category in content["categories"]} == {1, 3, 18}


def command(tool: str, *arguments: object) -> str:
    result = run_forked(f"tools/{tool}", *map(str, arguments))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return result.stdout


def figures_by_hand(annotations: Path, results: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()
