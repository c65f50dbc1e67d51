"""Checkpoints with generated weights, and data sets whose objects are what they detect.

Their AP is far from 0, so it changes with the detections, though nothing was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.mask import encode

from models import build_model, load_detector
from tests.golden import recipe
from util.class_map import ClassMap
from util.config import parse_config, with_classes

OBJECTS = 8  # of an image


def write_checkpoint(path: Path, flags: Sequence[str], classes: ClassMap) -> None:
    """A checkpoint of these flags."""
    config = with_classes(parse_config(list(flags)), classes)
    model = build_model(config)[0]
    recipe.fill(model)
    content = {"model": model.state_dict(), "args": config.flags(), "classes": classes.to_plain()}
    torch.save(content, path)


def write_detected(
    folder: Path, checkpoint: Path, sizes: Sequence[tuple[int, int]], spread: float = 0.0
) -> None:
    """Validation images of these sizes (width, height) in COCO's layout, with the best detections as objects.

    `spread` moves the sides of an object, by this part of its width and height on average.
    """
    detector, rng = load_detector(checkpoint, device="cpu"), np.random.default_rng(0)
    known = {category.id: category.name for category in detector.classes.categories}
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for i, (width, height) in enumerate(sizes, 1):
        blocks = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / "val2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        found = detector(picture)
        ids, masks = found.category_ids.tolist(), found.masks
        for place in [place for place, number in enumerate(ids) if number in known][:OBJECTS]:
            sides = found.boxes[place].numpy()
            moved = sides + spread * rng.standard_normal(4) * np.tile(sides[2:] - sides[:2], 2)
            x, y, right, bottom = moved.tolist()
            box = [x, y, right - x, bottom - y]
            number, area = len(annotations) + 1, box[2] * box[3]
            outline: object = [[x, y, right, y, right, bottom, x, bottom]]
            if masks is not None and masks[place].any():
                outline = encode(np.asfortranarray(masks[place].numpy(), np.uint8))
                outline["counts"] = outline["counts"].decode()
            annotations.append(
                {"id": number, "image_id": i, "category_id": ids[place], "bbox": box, "area": area}
                | {"iscrowd": 0, "segmentation": outline}
            )
    categories = [{"id": number, "name": name} for number, name in known.items()]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
