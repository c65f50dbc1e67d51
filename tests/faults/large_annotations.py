"""Annotations of COCO's size, to see how long they take and how much memory.

    python tests/faults/large_annotations.py /tmp/large
    /usr/bin/time -v python tools/check_data.py --coco_path /tmp/large --no_images
    python tests/faults/large_annotations.py /tmp/large --evaluate faster                  # or pycocotools
    python tests/faults/large_annotations.py /tmp/large --workers 4

Without pictures: 118,287 training images with 860,001 objects and 5,000 validation images with
36,781, in 80 categories with COCO's ids, polygons of COCO's length and its other fields, which
makes files of about 450 and 19 MB. No object has a fault. --evaluate computes COCO's figures of 100
detections for each validation image of a folder that is there. --workers opens its training set and
shows the memory of this process and of loader workers that read 20,000 items, all of one picture.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run as a script, this folder would be searched instead

import numpy as np
import torch
from PIL import Image

from datasets import build_dataset
from datasets.coco_eval import evaluate_results, metrics_table
from datasets.coco_format import read_annotations
from datasets.loader import build_loader
from datasets.samplers import EvalBatches
from tests.faults.soak import memory
from util.class_map import COCO_CLASSES
from util.config import parse_config

COUNTS = {"train2017": (118_287, 860_001), "val2017": (5_000, 36_781)}
_POINTS = 23  # of an object's polygons on average: 46 numbers, as in COCO
_CROWDS = 0.012  # share of the objects


def write_large(folder: Path, scale: float = 1.0) -> None:
    """The two annotation files and empty image folders; `scale` is the share of COCO's size."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    first = 0
    for name, counts in COUNTS.items():
        (folder / name).mkdir(exist_ok=True)
        images, objects = (max(1, round(count * scale)) for count in counts)
        with open(folder / "annotations" / f"instances_{name}.json", "w") as file:
            _write(file, np.random.default_rng(images), first, images, objects)
        first += images


def _write(file: Any, rng: np.random.Generator, first: int, images: int, objects: int) -> None:
    sizes = rng.choice([[640, 480], [640, 427], [480, 640], [500, 375], [612, 612]], images)
    file.write('{"info": {"description": "random polygons"}, "licenses": [], "images": [')
    _write_list(file, (_image(first + i + 1, *map(int, size)) for i, size in enumerate(sizes)))
    file.write('], "annotations": [')
    _write_list(file, _objects(rng, first, sizes, objects))
    file.write('], "categories": [')
    _write_list(
        file, ({"supercategory": "thing", "id": c.id, "name": c.name} for c in COCO_CLASSES.categories)
    )
    file.write("]}")


def _write_list(file: Any, entries: Iterator[dict[str, Any]]) -> None:
    for i, entry in enumerate(entries):
        file.write(", " * bool(i) + json.dumps(entry))


def _image(number: int, width: int, height: int) -> dict[str, Any]:
    name = f"{number:012}.jpg"
    return {
        "license": 4,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm7.staticflickr.com/6116/{number:010}_da26cf2c9e_z.jpg",
        "id": number,
    }


def _objects(rng: np.random.Generator, first: int, sizes: np.ndarray, count: int) -> Iterator[dict[str, Any]]:
    # many images have few objects and some have dozens, a few have none
    of_image = np.sort(rng.choice(len(sizes), count, p=rng.dirichlet(np.full(len(sizes), 1.2))))
    ids = np.array([c.id for c in COCO_CLASSES.categories])
    categories = rng.choice(ids, count, p=rng.dirichlet(np.full(len(ids), 0.5)))
    for i, (image, category) in enumerate(zip(of_image.tolist(), categories.tolist(), strict=True)):
        width, height = map(int, sizes[image])
        number_of_points = max(3, int(rng.gamma(2.0, _POINTS / 2)))
        radius = min(width, height) * rng.uniform(0.02, 0.45)
        angle = np.sort(rng.uniform(0, 2 * np.pi, number_of_points))
        x = np.clip(rng.uniform(0, width - 2) + radius * np.cos(angle), 0, width).round(2)
        y = np.clip(rng.uniform(0, height - 2) + radius * np.sin(angle), 0, height).round(2)
        # the outline may lie outside
        left, top = min(x.min(), width - 0.5), min(y.min(), height - 0.5)
        box = [round(float(v), 2) for v in (left, top, max(0.5, x.max() - left), max(0.5, y.max() - top))]
        crowd = int(rng.random() < _CROWDS)
        outline = np.stack([x, y], 1).reshape(-1).tolist()
        segmentation = {"counts": [int(v) for v in outline], "size": [height, width]} if crowd else [outline]
        yield {
            "segmentation": segmentation,
            "area": round(box[2] * box[3] * 0.7, 4),
            "iscrowd": crowd,
            "image_id": first + image + 1,
            "bbox": box,
            "category_id": category,
            "id": (900_100_000_000 if crowd else 0) + first * 10 + i + 1,
        }


def evaluate(path: Path, evaluator: str) -> None:
    """Print the figures of random detections, the seconds, and the process's peak memory before and
    after.
    """
    coco, rng = read_annotations(path), np.random.default_rng(0)
    detections = []
    for image in coco.imgs:
        near = [(entry["bbox"], entry["category_id"]) for entry in coco.imgToAnns[image]]
        boxes, categories = rng.uniform(0, 300, (100, 4)).tolist(), rng.choice([*coco.cats], 100).tolist()
        for box, category in [*near, *zip(boxes, categories, strict=True)][:100]:
            x, y, width, height = (np.array(box) + rng.normal(0, 4, 4)).tolist()
            moved = [x, y, max(0.5, width), max(0.5, height)]
            score = float(rng.random())
            detections.append({"image_id": image, "category_id": category, "bbox": moved, "score": score})
    before, start = _peak_mebibytes(), time.perf_counter()
    stats = evaluate_results(coco, detections, evaluator).stats
    seconds = time.perf_counter() - start
    print(
        f"{evaluator}: {len(detections)} detections of {len(coco.imgs)} images, {seconds:.1f} s, "
        f"peak memory {before:.0f} MiB before and {_peak_mebibytes():.0f} MiB after"
    )
    print(metrics_table(stats))


def load(folder: Path, workers: int) -> None:
    """Print the seconds to open the training set, and the memory (proportional set size) of all processes."""
    start = time.perf_counter()
    config = parse_config(["--coco_path", str(folder), "--augmentation", "none", "--train_sizes", "32"])
    dataset = build_dataset("train", config)
    del dataset.coco  # as a training does once it has checked it
    print(f"{len(dataset)} images opened in {time.perf_counter() - start:.1f} s")

    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "JPEG")
    dataset._bytes = lambda _: picture.getvalue()
    loader = build_loader(dataset, EvalBatches(len(dataset), 8, 0, 1), workers, torch.device("cpu"))
    for batch, _ in enumerate(loader, 1):
        if batch in (50, 2500):
            family = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
            shares = [memory(pid, "Pss") / 1024 for pid in family]
            print(f"after {8 * batch} items: {sum(shares):.0f} MiB in {len(family)} processes", flush=True)
        if batch == 2500:
            return


def _peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write, in COCO's layout")
    parser.add_argument("--scale", type=float, default=1.0, help="share of COCO's size (default: 1)")
    parser.add_argument("--evaluate", choices=("faster", "pycocotools"), help="what computes COCO's figures")
    parser.add_argument("--workers", type=int, help="loader workers that read the training set")
    args = parser.parse_args()
    if args.workers:
        load(args.folder, args.workers)
        return
    if args.evaluate:
        evaluate(args.folder / "annotations/instances_val2017.json", args.evaluate)
        return
    write_large(args.folder, args.scale)
    for name in COUNTS:
        path = args.folder / "annotations" / f"instances_{name}.json"
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
