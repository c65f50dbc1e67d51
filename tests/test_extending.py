"""The recipes of docs/extending.md, applied to a copy of the code."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, write_coco

PAGE = (ROOT / "docs/extending.md").read_text()
COPIED = ("main.py", "engine.py", "models", "datasets", "util")


@pytest.fixture(scope="module")
def changed_code(tmp_path_factory):
    """A copy of the code with every diff and every new file of the page."""
    folder = tmp_path_factory.mktemp("code")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for block in re.findall(r"```diff\n(.*?)```", PAGE, flags=re.S):
        apply(block, folder)
    for name, place, code in re.findall(
        r"```python\n# (\S+\.py)(?:, above (\w+))?\n(.*?)```", PAGE, flags=re.S
    ):
        path = folder / name
        if place:
            before, after = path.read_text().split(f"\n{place} = ")
            path.write_text(f"{before}\n{code}\n\n{place} = {after}")
        else:
            path.write_text(code)
    return folder


def apply(diff: str, folder) -> None:
    """Apply each hunk by its context alone: line numbers on the page would be wrong tomorrow."""
    path = folder / re.search(r"^\+\+\+ b/(\S+)$", diff, flags=re.M)[1]
    text = path.read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[:1] in (" ", "-"))
        new = "\n".join(line[1:] for line in lines if line[:1] in (" ", "+"))
        assert text.count(old) == 1, f"{path.name} has changed, the page has not:\n{old}"
        text = text.replace(old, new)
    path.write_text(text)


def write_csv(folder) -> None:
    """The boxes of a COCO data set as CSV files."""
    for split in ("train", "val"):
        content = json.loads((folder / f"annotations/instances_{split}2017.json").read_text())
        files = {image["id"]: image["file_name"] for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "x0", "y0", "x1", "y1", "class"))
            for item in content["annotations"]:
                x, y, width, height = item["bbox"]
                name = names[item["category_id"]]
                writer.writerow((files[item["image_id"]], x, y, x + width, y + height, name))


def test_a_run_with_all_recipes(changed_code, tmp_path):
    data = tmp_path / "data"
    write_coco(data, num_train=4, num_val=2)
    write_csv(data)
    model = list(SMALL_MODEL)
    model[model.index("--backbone") + 1] = "convnext_tiny"
    flags = ("--dataset_file", "csv", "--augmentation", "colour", "--smooth_loss_coef", "2", "--epochs", "1")
    places = ("--train_images", data / "train2017", "--train_annotations", data / "train.csv")
    places += ("--val_images", data / "val2017", "--val_annotations", data / "val.csv")
    command = [sys.executable, "main.py", *model, *SMALL_IMAGES, *BATCHFORMER, *flags, *map(str, places)]
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        cwd=changed_code,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr

    line = json.loads((tmp_path / "out/log.txt").read_text())
    unscaled = line["train_loss_smooth_unscaled"]
    assert unscaled > 0
    assert line["train_loss_smooth"] == pytest.approx(2 * unscaled)
    assert "train_loss_smooth_0" in line, "every decoder layer has the new loss"


def test_a_new_backbone_is_recognised_and_trains(changed_code):
    code = (
        "from models.backbone import Backbone, build_body\n"
        "from util.backbones import BACKBONES, recognise\n"
        "body = build_body('convnext_tiny', 'gn', 'none', dilation=False, multi_scale=True)\n"
        "assert recognise({n: t.shape for n, t in body.state_dict().items()}) == 'convnext_tiny'\n"
        "backbone = Backbone(body, BACKBONES['convnext_tiny'].trains)\n"
        "trained = [n for n, p in backbone.named_parameters() if p.requires_grad]\n"
        "assert 0 < len(trained) < len(list(backbone.parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=changed_code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
