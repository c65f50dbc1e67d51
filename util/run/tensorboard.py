"""What a run tells TensorBoard: losses and rates of its steps, all figures of its epochs, pictures
of its detections.

Two event files under <output_dir>/tensorboard: `steps`, over the images trained on, and `epochs`.
So a run that goes on from a checkpoint can take back exactly the points that it will write again.
Nothing that goes wrong here ends a run.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from util.draw.curves import FIGURES
from util.errors import UserError
from util.images.files import as_rgb

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PICTURES = 4
PICTURE_SIDE = 640  # pixels of the longer side
THRESHOLD = 0.3  # detections that score less are not drawn
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
        folder: for the two files; None writes nothing (other processes than the main one, or
            without --tensorboard).
        images: how many images the run has been trained on. Points of later steps are of a run that
            was interrupted, and are taken back; likewise those of epochs from `epochs` on, the
            number of finished ones.
    """

    def __init__(self, folder: Path | None, images: int = 0, epochs: int = 0) -> None:
        self._folder = folder
        self._first = {"steps": images + 1, "epochs": epochs}
        self._writers: dict[str, SummaryWriter] = {}

    def step(self, values: Mapping[str, float], images: int) -> None:
        """Scalars after so many images."""
        self._write("steps", lambda writer: _add_scalars(writer, values, images))

    def epoch(self, row: Mapping[str, Any]) -> None:
        """The figures of an epoch, a line of log.txt."""

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
            write(self._writer(name))
        except (
            Exception
        ) as error:  # of a full disk, of a picture, of protocol buffers: none of it may end a run
            log.warning(
                "TensorBoard gets no more of this run: %s could not be written (%s)", self._folder, error
            )
            self._folder = None

    def _writer(self, name: str) -> SummaryWriter:
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            _quiet_writer_threads()
            self._writers[name] = SummaryWriter(
                str(self._folder / name), purge_step=self._first[name], flush_secs=FLUSH_SECONDS
            )
        return self._writers[name]


def epoch_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A line of log.txt by TensorBoard's names: "train/loss", "val/loss", "val/AP50", "val
    averaged/AP50". COCO's -1, which says that there is nothing to measure, is left out, and so are
    the unscaled losses, which have the shape of the others.
    """
    scalars = {}
    for key, value in row.items():
        part, _, name = key.partition("_")
        if part == "test" and name.startswith("ema_"):
            part, name = "test averaged", name.removeprefix("ema_")
        part = part.replace("test", "val")
        if name == "coco_eval_bbox":
            scalars |= {f"{part}/{figure}": v for figure, v in zip(FIGURES, value, strict=True) if v >= 0}
        elif (
            part.startswith(("train", "val"))
            and isinstance(value, int | float)
            and not name.endswith("_unscaled")
        ):
            scalars[f"{part}/{name}"] = value
    return scalars


def detection_pictures(
    images: Mapping[int, Path],
    truth: Mapping[int, Sequence[Mapping[str, Any]]],
    results: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
) -> dict[str, Image.Image]:
    """Ground truth beside detections for a few images, spread evenly over the data set.

    Args:
        images: image id -> its file.
        truth: image id -> its annotations (COCO); boxes are x, y, width, height in pixels.
        results: detections in COCO's results format.
        names: category id -> name.
    """
    from util.draw.boxes import draw_coco, side_by_side  # takes most of a second

    ids = sorted(images)
    chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, min(PICTURES, len(ids))).round().astype(int)]
    found: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in chosen}
    for result in results:
        if result["image_id"] in found and result["score"] >= THRESHOLD:
            found[result["image_id"]].append(result)
    pictures = {}
    for image_id in chosen:
        try:
            with Image.open(images[image_id]) as image:
                picture = as_rgb(image)
            pair = [
                draw_coco(picture, entries, names) for entries in (truth.get(image_id, []), found[image_id])
            ]
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # SyntaxError: a broken PNG
            log.warning("no picture of %s for TensorBoard (%s)", images[image_id], error)
            continue
        for drawn in pair:
            drawn.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        titles = "Ground truth", f"Detections, score >= {THRESHOLD}"
        pictures[f"detections/{images[image_id].name}"] = side_by_side(*pair, titles)
    return pictures


def _add_scalars(writer: SummaryWriter, values: Mapping[str, float], at: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, at)


def _quiet_writer_threads() -> None:
    """What a writer's thread meets, `Board` hears of when it writes next and says in one line; not
    a traceback, too.
    """
    before = threading.excepthook
    if getattr(before, "quiet_writers", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    hook.quiet_writers = True
    threading.excepthook = hook
