"""Cut a small data set out of a COCO-format one, to see whether a model can learn it by heart.

    python tools/subset_coco.py --coco_path data/coco --num_images 8 --output_dir data/coco8
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder would be searched instead

from datasets.coco import read_annotations
from util.config import make_parser
from util.errors import UserError, run_as_command


def main() -> None:
    args = _parser().parse_args()
    split = f"{args.split}2017"
    source = Path(args.coco_path)
    content = read_annotations(source / "annotations" / f"instances_{split}.json").dataset
    images = choose_images(content, args.num_images, args.max_objects)
    subset = restrict(content, {image["id"] for image in images})
    for name in ("train2017", "val2017"):  # training and validation alike: what is asked is whether it was learnt
        write_split(Path(args.output_dir), name, subset, source / split)
    objects = len(subset["annotations"])
    print(f"{args.output_dir}: {len(images)} images with {objects} objects, as training and as validation set")


def choose_images(content: dict[str, Any], count: int, max_objects: int) -> list[dict[str, Any]]:
    """The first `count` images by id that have between 1 and `max_objects` objects. Raises UserError if there are fewer."""
    objects = Counter(annotation["image_id"] for annotation in content["annotations"])
    fitting = [image for image in content["images"] if 1 <= objects[image["id"]] <= max_objects]
    if len(fitting) < count:
        raise UserError(f"only {len(fitting)} images have 1 to {max_objects} objects; lower --num_images or raise --max_objects")
    return sorted(fitting, key=lambda image: image["id"])[:count]


def restrict(content: dict[str, Any], image_ids: set[int]) -> dict[str, Any]:
    """The same annotations for some images only."""
    return content | {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [annotation for annotation in content["annotations"] if annotation["image_id"] in image_ids],
    }


def write_split(folder: Path, name: str, content: dict[str, Any], images: Path) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for image in content["images"]:
        try:
            shutil.copyfile(images / image["file_name"], folder / name / image["file_name"])
        except OSError as error:
            raise UserError(f"{images / image['file_name']} can't be copied ({error.strerror}); check --coco_path") from None
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def _parser():
    parser = make_parser("tools/subset_coco.py", __doc__.split("\n")[0])
    parser.add_argument("--coco_path", default="data/coco", help="folder in COCO's layout")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="part to take the images from")
    parser.add_argument("--num_images", type=int, default=8, help="how many")
    parser.add_argument("--max_objects", type=int, default=12, help="pass over images with more objects")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    return parser


if __name__ == "__main__":
    run_as_command(main)
