"""The parts of an export that are quick; whole files are exported in tests/faults/export_files.py."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model, load_detector
from models.backbone import _resize_mask_by_index, resize_mask
from models.export.sampling import attend_by_gathers
from models.ops import reference
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL
from tools import export
from tools.exported.verify import compare
from util.class_map import Category, ClassMap
from util.config import parse_config
from util.errors import UserError

CLASSES = ClassMap(4, (Category(0, 3, "person"), Category(1, 17, "traffic light"), Category(2, 1000, "dog")))
# all that changes the graph: BatchFormerV2 is left out, frozen norms go into convolutions
FLAGS = [
    *SMALL_IMAGES,
    *SMALL_MODEL,
    *("--backbone_norm", "frozen_bn", "--enc_layers", "1", "--with_box_refine", "--two_stage", "--masks"),
    *("--eval_size", "192", "--max_size", "320", *BATCHFORMER),
]
SIZES = [(320, 192), (110, 140), (200, 100), (96, 200)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, and a data set whose objects are what it detects: AP is high, and sees a change."""
    folder = tmp_path_factory.mktemp("export")
    config = parse_config(FLAGS)
    model = build_model(config)[0]
    recipe.fill(model)
    content = {"model": model.state_dict(), "args": config.flags(), "classes": CLASSES.to_plain()}
    torch.save(content, folder / "checkpoint.pth")

    detector = load_detector(folder / "checkpoint.pth", device="cpu")
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES, 1):
        small = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / "val2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for found in list(detector(picture))[:8]:
            x, y, right, bottom = found.box
            box = [x, y, right - x, bottom - y]
            number, area = len(annotations) + 1, box[2] * box[3]
            polygon = [[x, y, right, y, right, bottom, x, bottom]]
            annotations.append(
                {"id": number, "image_id": i, "category_id": found.category_id, "bbox": box, "area": area}
                | {"iscrowd": 0, "segmentation": polygon}
            )
    categories = [{"id": one.id, "name": one.name} for one in CLASSES.categories]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    return folder


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gathers_equal_the_reference_operator(coordinates):
    torch.manual_seed(0)
    shapes = [(9, 8), (7, 7), (6, 1), (1, 1)]
    value = torch.randn(2, sum(height * width for height, width in shapes), 4, 8)
    points = torch.rand(2, 11, 4, coordinates) * 1.4 - 0.2
    offsets, logits = 5 * torch.randn(2, 11, 4, 4, 3, 2), torch.randn(2, 11, 4, 4, 3)
    for query, number in enumerate((torch.nan, torch.inf, -torch.inf, 1e30)):
        offsets[0, query, :, :, 0] = number
    found = attend_by_gathers(value, shapes, points, offsets, logits)
    torch.testing.assert_close(found, reference.fused_forward(value, shapes, points, offsets, logits))
    # values in half precision are summed in float32, as the operator does
    low = attend_by_gathers(value.half(), shapes, points, offsets, logits)
    assert low.dtype == torch.half
    torch.testing.assert_close(low.float(), found, rtol=1e-2, atol=1e-2)


def test_masks_are_resized_to_the_bit():
    for side in range(65, 1400):
        mask = torch.arange(side)[None, None] >= torch.tensor([[[side // 2]], [[side - 7]]])
        smaller = side
        for _ in range(6):
            smaller = -(-smaller // 2)
            found = _resize_mask_by_index(mask, (1, smaller))
            assert torch.equal(found, resize_mask(mask, (1, smaller))), (side, smaller)


# ---- the gate


def test_detections_are_paired_by_class_and_box(folder):
    found = load_detector(folder / "checkpoint.pth", device="cpu")(folder / "val2017" / "1.png")
    assert compare(found, found).unpaired == 0
    # another order is no difference
    order = torch.arange(len(found)).flip(0)
    assert (
        compare(
            found,
            replace(found, boxes=found.boxes[order], scores=found.scores[order], labels=found.labels[order]),
        ).unpaired
        == 0
    )
    for changed in (
        {"boxes": found.boxes + torch.tensor([0.6, 0, 0, 0])},
        {"scores": found.scores + 2e-3},
        {"labels": (found.labels + 1) % 4},
        {"boxes": torch.full_like(found.boxes, torch.nan)},
    ):
        assert compare(found, replace(found, **changed)).unpaired > 0
    within = compare(found, replace(found, boxes=found.boxes + 0.4, scores=found.scores + 9e-4))
    assert within.unpaired == 0
    assert (within.pixels, within.score) == pytest.approx((0.4, 9e-4), rel=1e-2)


# ---- bad input


def test_missing_packages_are_named_first(folder, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find(name, *rest)
    )
    command = ["--resume", str(tmp_path / "no.pth"), "--output", str(tmp_path / "model.onnx")]
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        export.main(command)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_detector(tmp_path / "model.onnx")
