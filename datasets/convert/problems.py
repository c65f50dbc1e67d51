"""What is wrong with a data set to convert: collected, and reported at the end."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets.coco_format import shown
from util.config import DataConfig
from util.errors import UserError
from util.images.files import BadImageError, Header, read_header

# pixels; a box further outside is not rounded, but of another image or in another unit
_ROUNDING = 1.0
# pixels; shorter sides would be 0 in the written file
_SHORTEST = 1e-3
BOXES_CUT = "boxes cut at the border of their image"
BOXES_TURNED = "images with an EXIF orientation: boxes turned to the pixels as stored"


class Corners(NamedTuple):
    """A box in pixels; (0, 0) is the outer corner of the first pixel."""

    x0: float
    y0: float
    x1: float
    y1: float

    def shortest_side(self) -> float:
        return min(self.x1 - self.x0, self.y1 - self.y0)


@dataclass
class Problems:
    """The problems of a source, which end the conversion or are left out and counted.

    on_bad: "stop"; "skip", leave out; "clip", cut boxes that reach out of their image, and leave
    out the rest. kinds: number of problems of each kind, named as in the check (datasets/preflight).
    notes: number of things that were mended or found in an unusual way.
    """

    on_bad: str = "stop"
    messages: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, message: str, kind: str = "other") -> None:
        """`message` is one line that names file and line or object."""
        self.messages.append(message)
        self.kinds[kind] += 1

    def stop_if_asked(self) -> None:
        """Raises UserError if there are problems and `on_bad` is "stop"."""
        if self.on_bad == "stop" and self.messages:
            raise UserError(
                f"{self.messages[0]}; problems in all: {self.counted()}; fix them, or leave such things "
                "out with --on_bad skip (clip: also cut boxes that reach out of their image)"
            )

    def counted(self) -> str:
        """The problems by kind, the most frequent first."""
        return ", ".join(f"{kind} {count}" for kind, count in self.kinds.most_common())

    def nothing_left(self, what: str) -> UserError:
        """The error of a source of which everything was left out; `what` begins the message."""
        message = f"{what} that can be used"
        if self.messages:
            message += f"; problems: {len(self.messages)}, the first one: {self.messages[0]}"
        return UserError(message)

    def placed(self, corners: Corners, size: tuple[int, int], where: str) -> Corners | None:
        """The box cut to its image, or None if it is wrong; `where` begins the message."""
        # the part of the box in the image, and how far the rest reaches
        x0, y0, x1, y1 = corners
        width, height = size
        within = Corners(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        outside = max(-x0, -y0, x1 - width, y1 - height)
        if not all(map(math.isfinite, corners)):
            kind, what = "wrong_bbox", "is not finite"
        elif corners.shortest_side() < _SHORTEST:
            kind, what = "degenerate_box", "has no width or no height"
        elif within.shortest_side() < _SHORTEST:
            kind, what = "box_outside", f"lies outside of the image of {width} x {height}"
        elif outside > _ROUNDING and self.on_bad != "clip":
            kind, what = "box_reaches_out", f"reaches {outside:g} pixels out of the image"
            what += f" of {width} x {height} (--on_bad clip cuts it)"
        else:
            self.notes[BOXES_CUT] += outside > _ROUNDING
            return within
        self.add(f"{where}: box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) {what}", kind)
        return None

    def add_missing(self, name: str, reason: str, where: str) -> None:
        """A name that `where` has and whose file was not found; `reason` is that of Findings.missing."""
        self.add(f"{where} names the image {shown(name)}, and {reason}", "missing_image")

    def header(self, path: Path) -> Header | None:
        """Size and orientation of an image, or None if it can't be used."""
        try:
            return read_header(path, DataConfig.max_image_megapixels, "or take it out")
        except BadImageError as error:
            self.add(f"{error.path} {error.reason}", "broken_image")
            return None


def coco_box(corners: Corners) -> dict[str, Any]:
    """COCO's bbox and area of a box."""
    x0, y0, x1, y1 = corners
    box = [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)]
    return {"bbox": box, "area": round(box[2] * box[3], 4)}


def as_stored(corners: Corners, header: Header) -> Corners:
    """The box in the image as stored, which training reads, by the table of tag 274 in Exif 2.32.

    Args:
        corners: the box in the image as viewers show it, turned by its EXIF orientation.
    """
    (u0, v0), (u1, v1) = (point_as_stored(*point, header) for point in (corners[:2], corners[2:]))
    # turning may exchange the corners
    return Corners(min(u0, u1), min(v0, v1), max(u0, u1), max(v0, v1))


def point_as_stored(u: float, v: float, header: Header) -> tuple[float, float]:
    """A point of the image as viewers show it, in the image as stored."""
    width, height = header.size
    if header.orientation >= 5:  # rows are columns
        u, v = v, u
    if header.orientation in (2, 3, 7, 8):  # left is right
        u = width - u
    if header.orientation in (3, 4, 6, 7):  # up is down
        v = height - v
    return u, v
