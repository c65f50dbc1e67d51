"""Draw ground truth and detections side by side, one picture an image, and a contact sheet of all."""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a script sees only its own folder, not the project
from datasets.respell import respell
from util.config import DataConfig, add_score_threshold_flag, make_parser
from util.draw.boxes import contact_sheet, draw_coco, side_by_side
from util.errors import UserError, run_as_command
from util.images.files import decode, read_image_file

EXAMPLE = """\
  python tools/draw_detections.py --images coco/val2017 \\
      --annotations coco/annotations/instances_val2017.json \\
      --predictions exps/run/results.json --output_dir exps/run/pictures --score_threshold 0.4
"""
PAIRS_IN_A_ROW = 2


def get_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/draw_detections.py", __doc__, EXAMPLE)
    required = parser.add_argument_group("required")
    add = required.add_argument
    add("--annotations", type=Path, required=True, default=argparse.SUPPRESS, help="COCO instances JSON")
    add("--images", type=Path, required=True, default=argparse.SUPPRESS, help="folder of the images")
    add(
        "--predictions",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="COCO results JSON: a list of {image_id, category_id, bbox [x, y, w, h], score}",
    )
    add("--output_dir", type=Path, required=True, default=argparse.SUPPRESS, help="folder for the PNG files")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--num_images", type=int, default=8, help="how many images, taken evenly over the set"
    )
    choice.add_argument(
        "--image_ids", type=int, nargs="+", default=argparse.SUPPRESS, help="draw these images instead"
    )
    add_score_threshold_flag(parser, "leave out detections that score less")
    return parser


def read_json(path: Path) -> Any:
    """Raises OSError where the file cannot be read and UserError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not text at all
        raise UserError(f"{path} is not JSON: {error}") from error


def read_annotations(path: Path) -> COCO:
    """Raises OSError, or UserError where the file is not COCO instances."""
    coco = COCO()
    coco.dataset = read_json(path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            coco.createIndex()
        complete = (
            all("file_name" in image for image in coco.dataset["images"])
            and all("name" in category for category in coco.dataset["categories"])
            and all(_has_box(annotation) for annotation in coco.dataset["annotations"])
        )
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            f"{path} is not a COCO instances file: it needs images with file_name, categories with "
            f"name "
            "and annotations with image_id, category_id and bbox [x, y, w, h]"
        )
    return coco


def read_predictions(path: Path, coco: COCO) -> dict[int, list[dict]]:
    """Detections by image id. Raises OSError, or UserError where the file is not COCO results for
    these images.
    """
    results = read_json(path)
    if not isinstance(results, list):
        raise UserError(f"{path} is not a COCO results file: it must be a list of detections")
    by_image: dict[int, list[dict]] = {}
    for i, result in enumerate(results):
        if not _is_detection(result):
            raise UserError(f"{path}: entry {i} needs image_id, category_id, bbox [x, y, w, h] and score")
        by_image.setdefault(result["image_id"], []).append(result)
    if unknown := by_image.keys() - coco.imgs.keys():
        raise UserError(
            f"{path} has {_listed(unknown)}, which the annotations do not have: another data set?"
        )
    return by_image


def _is_detection(entry: Any) -> bool:
    return _has_box(entry) and isinstance(entry.get("score"), int | float)


def _has_box(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("bbox"), list) or len(entry["bbox"]) != 4:
        return False
    ids = isinstance(entry.get("image_id"), int | str) and isinstance(entry.get("category_id"), int | str)
    return ids and all(isinstance(value, int | float) for value in entry["bbox"])


def _listed(image_ids: Any) -> str:
    shown = sorted(image_ids, key=str)
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"image id {', '.join(map(str, shown[:5]))}{more}"


def choose_images(coco: COCO, num_images: int, image_ids: Sequence[int] | None) -> list[int]:
    """The wanted ids, or `num_images` spread evenly over the ids in order. Raises UserError."""
    if image_ids is not None:
        if unknown := set(image_ids) - coco.imgs.keys():
            raise UserError(f"the annotations do not have {_listed(unknown)}")
        return list(dict.fromkeys(image_ids))
    if num_images < 1:
        raise UserError(f"num_images {num_images} must be at least 1")
    if not coco.imgs:
        raise UserError("the annotations have no images")
    known = sorted(coco.imgs)
    places = np.linspace(0, len(known) - 1, min(num_images, len(known))).round().astype(int)
    return [known[i] for i in places]


def open_image(folder: Path, info: dict) -> Image.Image:
    """Raises UserError where the file cannot be read or is not as large as the annotations say."""
    path = folder / info["file_name"]
    megapixels, otherwise = DataConfig.max_image_megapixels, "or choose other --image_ids"
    image = decode(read_image_file(path, megapixels, otherwise), path, megapixels, otherwise)
    expected = (info.get("width", image.width), info.get("height", image.height))
    if image.size != expected:  # the boxes would all be in the wrong place
        raise UserError(
            f"{path} is {image.width} x {image.height}, but its annotations are for "
            f"{expected[0]} x {expected[1]}"
        )
    return image


def draw_pair(
    image: Image.Image, info: dict, truth: Sequence[dict], found: Sequence[dict], coco: COCO, threshold: float
) -> Image.Image:
    names = {i: category["name"] for i, category in coco.cats.items()}
    left, right = draw_coco(image, truth, names), draw_coco(image, found, names)
    titles = (
        f"Ground truth: {len(truth)}  ({info['file_name']})",
        f"Detections: {len(found)}  (score >= {threshold:g})",
    )
    return side_by_side(left, right, titles)


def run(args: argparse.Namespace) -> None:
    coco = read_annotations(args.annotations)
    predictions = read_predictions(args.predictions, coco)
    chosen = choose_images(coco, args.num_images, getattr(args, "image_ids", None))
    respell([coco.imgs[image_id] for image_id in chosen], args.images)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pairs = []
    for image_id in chosen:
        info = coco.imgs[image_id]
        found = [p for p in predictions.get(image_id, []) if p["score"] >= args.score_threshold]
        image = open_image(args.images, info)
        pairs.append(draw_pair(image, info, coco.imgToAnns[image_id], found, coco, args.score_threshold))
        stem = (
            Path(info["file_name"]).with_suffix("").as_posix().replace("/", "_")
        )  # val/1.jpg, train/1.jpg stay two
        pairs[-1].save(args.output_dir / f"{stem}.png")
    contact_sheet(pairs, PAIRS_IN_A_ROW).save(args.output_dir / "contact_sheet.png")
    print(f"{len(pairs)} pictures and contact_sheet.png are in {args.output_dir}")


def main(argv: Sequence[str]) -> None:
    args = get_parser().parse_args(argv)
    try:
        run(args)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
