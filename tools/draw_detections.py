"""Draw ground truth and detections side by side, one picture an image, and a contact sheet of all."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools.coco import COCO

# a script sees only its own folder, not the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.coco_masks import mask_of
from datasets.coco_results import read_results
from datasets.panoptic.format import read_boxes
from datasets.respell import respell
from util.config import DataConfig, add_score_threshold_flag, make_parser
from util.draw.boxes import contact_sheet, draw_coco, side_by_side
from util.errors import UserError, run_as_command
from util.images import evenly_chosen
from util.images.files import read_picture

EXAMPLE = """\
  python tools/draw_detections.py --images coco/val2017 \\
      --annotations coco/annotations/instances_val2017.json \\
      --predictions exps/run/results.json --output_dir exps/run/pictures --score_threshold 0.4
"""
PAIRS_IN_A_ROW = 2


def parser() -> argparse.ArgumentParser:
    made = make_parser("tools/draw_detections.py", __doc__, EXAMPLE)
    add = made.add_argument_group("required").add_argument
    add("--annotations", type=Path, required=True, help="COCO instances JSON")
    add("--images", type=Path, required=True, help="folder of the images")
    results = "COCO results JSON: a list of {image_id, category_id, bbox [x, y, w, h], score}"
    add("--predictions", type=Path, required=True, help=results)
    add("--output_dir", type=Path, required=True, help="folder for the PNG files")
    add = made.add_mutually_exclusive_group().add_argument
    add("--num_images", type=int, default=8, help="how many images, chosen evenly from the data set")
    add("--image_ids", type=int, nargs="+", help="draw these images instead")
    add_score_threshold_flag(made, "leave out detections that score less")
    return made


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    # Read and check everything before the first picture is written.
    coco = read_boxes(args.annotations)
    predictions = read_predictions(args.predictions, coco)
    chosen = choose_images(coco, args.num_images, args.image_ids)
    respell([coco.imgs[image_id] for image_id in chosen], args.images)

    # of a detector with masks (--masks), beside annotations that have them too
    with_masks = _have_masks(chain.from_iterable(predictions.values())) and _have_masks(coco.anns.values())
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        pairs = []
        for image_id in chosen:
            found = [p for p in predictions[image_id] if p["score"] >= args.score_threshold]
            pair = draw_pair(coco, image_id, args.images, found, args.score_threshold, with_masks)
            # with the folders in it: val/1.jpg and train/1.jpg are two pictures
            stem = Path(coco.imgs[image_id]["file_name"]).with_suffix("").as_posix().replace("/", "_")
            pair.save(args.output_dir / f"{stem}.png")
            pairs.append(pair)
        contact_sheet(pairs, PAIRS_IN_A_ROW).save(args.output_dir / "contact_sheet.png")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    print(f"{len(pairs)} pictures and contact_sheet.png are in {args.output_dir}")


def read_predictions(path: Path, coco: COCO) -> dict[int, list[dict[str, Any]]]:
    """Detections by image id. Raises UserError if the file is not COCO results for these images."""
    # an image without detections has an empty list
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in read_results(path):
        by_image[result["image_id"]].append(result)
    # results of another data set would give pictures without detections
    if unknown := by_image.keys() - coco.imgs.keys():
        listed = _listed(unknown)
        raise UserError(f"{path} has {listed}, which the annotations do not have: another data set?")
    return by_image


def choose_images(coco: COCO, num_images: int, image_ids: Sequence[int] | None) -> list[int]:
    """The wanted ids, or `num_images` spread evenly over the ids in order. Raises UserError."""
    # --image_ids replaces --num_images
    if image_ids is not None:
        if unknown := set(image_ids) - coco.imgs.keys():
            raise UserError(f"the annotations do not have {_listed(unknown)}")
        return list(dict.fromkeys(image_ids))
    if num_images < 1:
        raise UserError(f"num_images {num_images} must be at least 1")
    if not coco.imgs:
        raise UserError("the annotations have no images")
    return evenly_chosen(sorted(coco.imgs), num_images)


def _listed(image_ids: Iterable[int]) -> str:
    shown = sorted(image_ids)
    text = f"image id {', '.join(map(str, shown[:5]))}"
    if len(shown) > 5:
        text += f" and {len(shown) - 5} more"
    return text


def _have_masks(entries: Iterable[dict[str, Any]]) -> bool:
    return all(entry.get("segmentation") for entry in entries)


def draw_pair(
    coco: COCO,
    image_id: int,
    folder: Path,
    found: Sequence[dict],
    threshold: float,
    with_masks: bool = False,
) -> Image.Image:
    """The annotations of an image beside its detections, with masks if both have them.

    Raises UserError if its file cannot be read, or has another size than its annotations.
    """
    info, truth = coco.imgs[image_id], coco.imgToAnns[image_id]
    path = folder / info["file_name"]
    megapixels, otherwise = DataConfig.max_image_megapixels, "or choose other --image_ids"
    image = read_picture(path, megapixels, otherwise, upright=False)
    width, height = info.get("width", image.width), info.get("height", image.height)
    if image.size != (width, height):  # the boxes would all be in the wrong place
        size = f"{image.width} x {image.height}"
        raise UserError(f"{path} is {size}, but its annotations are for {width} x {height}")

    # all names, so that a class has the same colour in every picture
    names = {i: category["name"] for i, category in coco.cats.items()}
    titles = (
        f"Ground truth: {len(truth)}  ({info['file_name']})",
        f"Detections: {len(found)}  (score >= {threshold:g})",
    )
    sides = []
    for entries in (truth, found):
        masks = None
        if with_masks:
            masks = [mask_of(entry, info, path, f"correct it, {otherwise}") for entry in entries]
        sides.append(draw_coco(image, entries, names, masks))
    return side_by_side(sides[0], sides[1], titles)


if __name__ == "__main__":
    run_as_command(lambda: main(sys.argv[1:]))
