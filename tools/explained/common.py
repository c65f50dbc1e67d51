"""What the two commands of tools/explain.py share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL.Image import Image

from models import load_detector
from models.detector import Detector
from models.ops.reference import Shapes
from util.checkpoint import is_exported
from util.config import DataConfig, detector_flags
from util.errors import UserError
from util.images.files import read_picture

QUALITY = 80  # of JPEG


def detector_and_pictures(
    args: argparse.Namespace, paths: Sequence[Path], batchformer: bool = False
) -> tuple[Detector, list[Image]]:
    """What --resume names, and the pictures upright. Raises UserError."""
    if is_exported(args.resume):
        raise UserError(
            f"--resume {args.resume} was exported, and shows nothing of its inside; use the checkpoint"
        )
    detector = load_detector(
        args.resume, device=args.device, weights=args.weights, batchformer=batchformer, **detector_flags(args)
    )
    largest = DataConfig.max_image_megapixels
    return detector, [read_picture(path, largest, "or leave it out") for path in paths]


def chosen(
    flag: str, numbers: Sequence[int] | None, count: int, default: Sequence[int] = ()
) -> Sequence[int]:
    """The numbers of a flag. Raises UserError for one that is not among `count` things."""
    for number in numbers or ():
        if not 0 <= number < count:
            raise UserError(f"{flag} {number} must be from 0 to {count - 1}")
    return numbers or default


def token_at(shapes: Shapes, level: int, x: float, y: float) -> tuple[int, int, int]:
    """Row, column and number of a level's token at x, y in [0, 1]."""
    # 1 belongs to the last token
    rows, columns = shapes[level]
    row, column = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
    before = sum(height * width for height, width in shapes[:level])
    return row, column, before + row * columns + column


def save(figure: Figure, args: argparse.Namespace, name: str) -> Path:
    path = output_path(args, name)
    figure.savefig(path, pil_kwargs={"quality": QUALITY})  # PNG ignores it
    return path


def output_path(args: argparse.Namespace, name: str) -> Path:
    # only now: a command that is refused leaves no folder
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args.output_dir / f"{name}.{args.format}"
