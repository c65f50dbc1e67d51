"""TensorBoard's event files of a run: losses and rates of its steps, metrics of its epochs, pictures
of its detections.

There are two under <output_dir>/tensorboard: `steps`, over the images trained on, and `epochs`. So a
resumed run can remove exactly the points that it will write again. No error here ends a run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from util.draw.curves import FIGURE_KEYS, FIGURES
from util.errors import UserError
from util.images import evenly_chosen
from util.images.files import read_picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PICTURES = 4
PICTURE_SIDE = 640  # pixels of the longer side
THRESHOLD = 0.3  # detections that score less are not drawn
MEGAPIXELS = 200  # larger files are not drawn
FLUSH_SECONDS = 30


def check_tensorboard(wanted: bool) -> None:
    """Raise UserError if TensorBoard is wanted and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the flag out"
        )


class Board:
    """The event files of a run.

    Args:
        folder: for the two files; None writes nothing.
        images: how many images the run has been trained on. Later points, of a run that was
            interrupted, are removed; so are those of epochs from `epochs` on, the number of
            finished ones.
    """

    def __init__(self, folder: Path | None, images: int = 0, epochs: int = 0) -> None:
        self._folder = folder
        # TensorBoard hides points from these on that were written before
        self._first = {"steps": images + 1, "epochs": epochs}
        self._writers: dict[str, SummaryWriter] = {}

    def step(self, values: Mapping[str, float], images: int) -> None:
        """Scalars after so many images."""
        self._write("steps", lambda writer: _add_scalars(writer, values, images))

    def window(self, means: Mapping[str, float], rates: Mapping[str, float], images: int) -> None:
        """Means of weighted losses, and learning rates by group, after so many images."""
        values = {f"lr/{name}": rate for name, rate in rates.items()}
        # the unscaled losses have the shape of the scaled ones
        values |= {f"steps/{name}": mean for name, mean in means.items() if not name.endswith("_unscaled")}
        self.step(values, images)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """The metrics of an epoch, a line of log.txt."""

        def write(writer: SummaryWriter) -> None:
            _add_scalars(writer, epoch_scalars(row), row["epoch"])
            writer.flush()

        self._write("epochs", write)

    def pictures(self, make: Callable[[], Mapping[str, Image.Image]], epoch: int) -> None:
        """Pictures by name; `make` is called only if they are to be written."""

        def write(writer: SummaryWriter) -> None:
            for name, picture in make().items():
                writer.add_image(name, np.asarray(picture), epoch, dataformats="HWC")

        self._write("epochs", write)

    def close(self) -> None:
        for name in list(self._writers):
            self._write(name, lambda writer: writer.close())
        self._folder = None

    def _write(self, name: str, write: Callable[[SummaryWriter], object]) -> None:
        if self._folder is None:
            return
        try:
            # not before the first point: the package takes a second to load
            if name not in self._writers:
                self._writers[name] = _new_writer(self._folder / name, self._first[name])
            write(self._writers[name])
        except Exception as error:  # a full disk, a picture, protocol buffers: none may end a run
            text = "TensorBoard gets no more of this run: %s could not be written (%s)"
            log.warning(text, self._folder, error)
            self._folder = None


def epoch_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A line of log.txt by TensorBoard's names: "train/loss", "val/loss", "val/AP50", "val/mask AP50",
    "val averaged/AP50".

    Metrics of -1 are left out, which COCO gives where nothing can be measured, and so are the
    unscaled losses, which have the shape of the scaled ones.
    """
    scalars: dict[str, float] = {}
    kinds = {key: prefix for prefix, key in FIGURE_KEYS.items()}
    for key, value in row.items():
        match = re.fullmatch(r"(train|test_ema|test)_(.*?)(_unscaled)?", key)
        if not match or match[3]:
            continue
        group, name = {"train": "train", "test": "val", "test_ema": "val averaged"}[match[1]], match[2]
        if name in kinds:
            for metric, number in zip(FIGURES, value, strict=True):
                if number >= 0:
                    scalars[f"{group}/{kinds[name]}{metric}"] = number
        elif name.startswith("PQ_") and value["n"]:
            scalars[f"{group}/{name}"] = value["pq"]
        elif isinstance(value, int | float):
            scalars[f"{group}/{name}"] = value
    return scalars


def detection_pictures(dataset: Any, results: Sequence[Mapping[str, Any]]) -> dict[str, Image.Image]:
    """Ground truth beside detections for a few images, spread evenly over the data set, by name.

    results: detections in COCO's results format; if they have masks, the ground truth has some too.
    """
    from util.draw.boxes import draw_coco, side_by_side  # takes most of a second

    names = {category.id: category.name for category in dataset.classes.categories}
    masks = bool(results) and "segmentation" in results[0]
    found: dict[int, list[Mapping[str, Any]]] = {}
    for image_id in evenly_chosen(sorted(dataset.image_ids), PICTURES):
        found[image_id] = []
    for result in results:
        if result["image_id"] in found and result["score"] >= THRESHOLD:
            found[result["image_id"]].append(result)

    pictures = {}
    for image_id, detections in found.items():
        path = dataset.file_of(image_id)
        try:
            picture = read_picture(path, MEGAPIXELS, "it has no picture", upright=False)
            # equal sizes, so that the eye can compare
            left, right = (
                draw_coco(picture, entries, names, map(dataset.coco.annToMask, entries) if masks else None)
                for entries in (dataset.coco.imgToAnns.get(image_id, []), detections)
            )
        except (OSError, ValueError) as error:
            log.warning("no picture for TensorBoard: %s", error)
            continue
        for drawn in (left, right):
            drawn.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        titles = "Ground truth", f"Detections, score >= {THRESHOLD}"
        pictures[f"detections/{path.name}"] = side_by_side(left, right, titles)
    return pictures


def _add_scalars(writer: SummaryWriter, values: Mapping[str, float], at: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, at)


def _new_writer(folder: Path, first: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    _quiet_writer_threads()
    return SummaryWriter(str(folder), purge_step=first, flush_secs=FLUSH_SECONDS)


@functools.cache  # once
def _quiet_writer_threads() -> None:
    """Hide tracebacks of the writers' threads: `Board` gets the same error when it writes next."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    threading.excepthook = hook
