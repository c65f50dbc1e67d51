"""Runs for the tests of tools/report.py: made by hand, with detections of which every number is
known or can be computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from datasets.coco_eval import IOU_TYPES, evaluate_results, iou_types_of, precision_tables
from datasets.coco_format import read_annotations
from tools.ablation.grid import Variant
from tools.ablation.runs import Cell
from util.checkpoint import write_atomically
from util.config import parse_config
from util.run.record import write_record

CATEGORIES = {3: "cup", 17: "a cat with a very long name", 1000: "</script><b>dog</b>"}


def write_data(
    folder: Path,
    images: int = 12,
    categories: dict[int, str] = CATEGORIES,
    size: tuple[int, int] = (160, 120),
) -> Path:
    """Images with a few objects of every size, crowds among them, in COCO's layout; gives the
    annotations.
    """
    rng = np.random.default_rng(1)
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    named = [{"id": i, "name": name} for i, name in categories.items()]
    content: dict[str, list] = {"images": [], "annotations": [], "categories": named}
    for image in range(images):
        name = f"{image:03}.jpg"
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / "val2017" / name
        )
        content["images"].append({"id": image + 1, "file_name": name, "width": size[0], "height": size[1]})
        for number in range(image % 5):
            width, height = rng.integers(8, 100, 2)
            x, y = rng.integers(0, size[0] - width), rng.integers(0, max(1, size[1] - height))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 50,
                    "image_id": image + 1,
                    "bbox": [int(v) for v in (x, y, width, height)],
                    "category_id": [*categories][(image + number) % len(categories)],
                    "segmentation": [diamond(x, y, width, height)],
                    "area": int(width * height),
                    "iscrowd": int(len(content["annotations"]) == 6),
                }
            )
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    return path


def diamond(x: float, y: float, width: float, height: float) -> list[float]:
    """A polygon in a box."""
    middle, centre = float(x + width / 2), float(y + height / 2)
    return [middle, float(y), float(x + width), centre, middle, float(y + height), float(x), centre]


def with_masks(coco: COCO, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with a diamond in its box as a mask; the best one of the file with half of it."""
    results = []
    best = max(detections, key=lambda one: one["score"])
    for one in detections:
        image = coco.imgs[one["image_id"]]
        size = image["height"], image["width"]
        mask = mask_utils.decode(mask_utils.frPyObjects([diamond(*one["bbox"])], *size))[..., 0]
        if one is best:
            mask[:, round(one["bbox"][0] + one["bbox"][2] / 2) :] = 0
        runs = mask_utils.encode(np.asfortranarray(mask))
        results.append(one | {"segmentation": {"size": [*size], "counts": runs["counts"].decode()}})
    return results


def detections_of(coco: COCO, seed: int, noise: float = 6.0) -> list[dict[str, Any]]:
    """Boxes near the objects, some with the wrong class, some twice, some far off, some where
    nothing is.
    """
    rng = np.random.default_rng(seed)
    ids, results = sorted(coco.cats), []
    for annotation in coco.anns.values():
        for _ in range(rng.integers(0, 4)):
            category = annotation["category_id"] if rng.random() < 0.7 else int(rng.choice(ids))
            box = np.array(annotation["bbox"]) + rng.normal(0, noise, 4)
            results.append((annotation["image_id"], category, [*box[:2], *box[2:].clip(2)], rng.random()))
    for image in coco.imgs:
        results.append(
            (image, int(rng.choice(ids)), [*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)], rng.random())
        )
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [float(v) for v in box],
            "score": round(float(score), 2),
        }
        for image, category, box, score in results
    ]


def log_row(epoch: int, figures: list[float] | None = None, **more: Any) -> dict[str, Any]:
    row = {
        f"{part}_{name}": 10.0 / (epoch + 1)
        for part in ("train", "test")
        for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error")
    }
    row |= {"train_lr": 2e-4, "train_grad_norm": 5.0 + epoch, "epoch": epoch, "n_parameters": 1_234_567}
    return row | ({"test_coco_eval_bbox": figures} if figures else {}) | more


def write_run(
    folder: Path,
    annotations: Path,
    detections: list[dict[str, Any]],
    epochs: int = 6,
    *flags: str,
    prefix: str = "",
) -> Path:
    """A finished run of `epochs` epochs whose last evaluation gave `detections`."""
    truth = read_annotations(annotations)
    kinds = {kind: evaluate_results(truth, detections, iou_type=kind) for kind in iou_types_of(detections)}
    tables = {kind: precision_tables(evaluation) for kind, evaluation in kinds.items()}
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    write_atomically(tables.pop("bbox") | tables, folder / "eval" / f"{prefix}latest.pth")
    (folder / "eval" / f"{prefix}latest.json").write_text(json.dumps(detections))
    if prefix:
        return folder
    rows = [log_row(epoch) for epoch in range(epochs)]
    for kind, evaluation in kinds.items():
        for row in rows:
            share = (row["epoch"] + 1) / epochs
            figures = [max(value * share, min(value, 0)) for value in evaluation.stats.tolist()]
            row[f"test_{IOU_TYPES[kind].key}"] = figures
    (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = annotations.parent.parent
    config = parse_config(
        ["--coco_path", str(root), "--output_dir", str(folder), "--epochs", str(epochs), *flags]
    )
    val = {"images": str(root / "val2017"), "annotations": str(annotations), "num_images": 12}
    machine = {
        "torch": "2.10.0",
        "python": "3.11",
        "device": "cuda",
        "device_name": "Some GPU",
        "processes": 8,
    }
    write_record(
        folder,
        {"flags": config.flags(), "data": {"train": {"num_images": 100}, "val": val}},
        machine,
        {"epoch": 0},
    )
    return folder


def write_ablation(folder, finals, epochs=2):
    """Runs as they lie on the disk; finals: variant -> seed -> AP of the last epoch in percent."""
    variants = [Variant(name, ("--bf", name[-1])) for name in finals]
    cells = {}
    for variant in variants:
        for seed, final in enumerate(finals[variant.name]):
            cell = Cell(variant, seed, folder / variant.name / f"seed{seed}", folder / "console.txt")
            cells[variant.name, seed] = cell
            if final is None:
                continue
            cell.folder.mkdir(parents=True)
            (cell.folder / "run.json").write_text(json.dumps({"flags": {"epochs": epochs}}))
            rows = []
            for epoch in range(epochs):
                ap = final / 100 - 0.1 * (epochs - 1 - epoch)
                stats = [ap, ap + 0.1, ap, ap, ap, -1, *[ap] * 6]
                rows.append(json.dumps({"epoch": epoch, "test_coco_eval_bbox": stats}))
            (cell.folder / "log.txt").write_text("\n".join(rows))
    return variants, cells
