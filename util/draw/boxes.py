"""Pictures of detections: boxes with class and score (drawn by supervision), masks, pairs, contact sheets."""

import math
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

from util.images.files import as_rgb

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "OpenCV")  # it warns that it is slower without OpenCV
    import supervision as sv

MIN_SIDE = 480  # pixels; below this, letters would be as large as the objects
MAX_CELL = 1400  # pixels; a contact sheet of photographs from a phone should still open
MAX_LABEL = 16  # widths in font sizes; a longer label would hide too much
MASK_OPACITY = 0.45  # what is below should still be seen
PANOPTIC_OPACITY = 0.6  # a whole picture is tinted, and neighbours should differ
CROWDED = 40  # boxes; more of them get smaller letters

# Okabe and Ito's seven colours, which people with any common colour vision tell apart. Each next
# one is the vivid colour farthest in OKLab from all before it, for the worst of normal, red-blind
# and green-blind eyes.
COLORS = """
56b4e9 e69f00 009e73 f0e442 cc79a7 d55e00 0072b2 bb11ff 44ffee 77cc77 ffaabb 8877dd ff3366 dd00aa 66ff88
ff77dd ee44ff 00ddff 778833 88dd00 0099ff aa9900 ff7799 00cc44 aadd99 11bb88 ff22cc bb5588 eebbff dd99ff
ddcc66 9955dd 4488bb 00ddbb cc6666 ff9966 008855 77ffbb bb66bb dd5588 ff6666 11bbcc 44ff33 77bb00 00ee77
9988cc cc77ee cc55dd ee9999 88eecc 77aa44 ddee99 ee4444 6666ee ee77bb 66dddd ee99cc bbee66 ee2299 6677cc
66aa77 dd3366 00aaaa 00eedd dd00cc ff55aa 33dd88 66ccaa dd8888 ee0033 008877 ee66ff 6699ee aacc44 99bb66
00aadd 77eeff ee7744 33eeaa ff2200 ccaa44 338811 ffaa99 cc00dd aa6699 dd88cc cc7788 00ccbb ccdd88 bbeeaa
"""
PALETTE = sv.ColorPalette.from_hex(COLORS.split())


def draw_boxes(
    image: Image.Image,
    boxes: ArrayLike,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    classes: Sequence[str] = (),
    crowd: Sequence[bool] = (),
    masks: Iterable[ArrayLike] | None = None,
    enlarge: bool = True,
) -> Image.Image:
    """An RGB copy of a picture with n boxes on it, each labelled with class and score.

    Args:
        image: any mode that `as_rgb` takes.
        boxes: (n, 4) x0, y0, x1, y1 in pixels, cut at the border. NaN and boxes outside are left
            out.
        labels: n class names. A long one is shortened.
        scores: n numbers, or None for ground truth.
        classes: all class names of the data set, always in the same order: the place of a class
            decides its colour. The colour of a label that is not among them follows from its
            letters.
        crowd: n flags; a crowd region is tinted, and its label says so.
        masks: n masks (height, width) of the picture, tinted and outlined; where some overlap, the
            best detection (of ground truth the smallest object) is seen. None to draw none.
        enlarge: by a whole factor, if the longer side has less than 480 pixels.

    Raises ValueError if the lengths disagree, or `boxes` is not (n, 4).
    """
    scale = _scale_of(image, enlarge)
    canvas = ImageOps.scale(as_rgb(image), scale, Image.Resampling.LANCZOS)

    # Sizes follow the picture. A black casing around the coloured line shows on any ground.
    side = math.sqrt(canvas.width * canvas.height)
    line, casing = max(2, round(side / 260)), max(1, round(side / 800))
    reach = (line + 1) // 2 + casing  # from the middle of a line to its outer edge
    font_size = max(12, round(0.026 * side))

    lines, visible = _lines_around(np.asarray(boxes, dtype=np.float64) * scale, canvas.size, reach)
    colors = _colors_of(labels, classes)
    crowds = np.asarray(crowd or [False] * len(labels), dtype=bool)

    # What is drawn last is on top: detections with a high score, and small objects of the ground truth.
    rank = -(lines[:, 2:] - lines[:, :2]).prod(axis=1)
    if scores is not None:
        rank = np.asarray(scores, dtype=np.float64)
    if not len(lines) == len(labels) == len(rank) == len(crowds):
        raise ValueError("boxes, labels, scores and crowd must have one entry a box (shapes differ)")
    order = np.argsort(rank, kind="stable")
    order = order[visible[order]]

    # masks lie under all boxes
    if masks is not None:
        _draw_masks(canvas, masks, order, colors, scale, line)

    found = sv.Detections(lines[order], class_id=colors[order])
    tinted = order[crowds[order]]
    # even without a box it would blend the whole picture
    if len(tinted):
        tint = sv.ColorAnnotator(PALETTE, opacity=0.35)
        tint.annotate(canvas, sv.Detections(lines[tinted], class_id=colors[tinted]))
    sv.BoxAnnotator(sv.Color.BLACK, thickness=line + 2 * casing).annotate(canvas, found)
    sv.BoxAnnotator(PALETTE, thickness=line).annotate(canvas, found)

    # The labels; with many boxes their letters are smaller.
    if len(found) > CROWDED:
        font_size = round(0.7 * font_size)
    letters = "".join([*classes, *labels])
    font, room = _font(letters, font_size), min(canvas.width - font_size, MAX_LABEL * font_size)
    texts = []
    for i in order:
        rest = " (crowd)" if crowds[i] else ""
        if scores is not None:
            rest += f" {scores[i]:.2f}"
        texts.append(_shorten(labels[i], rest, font, room))
    labeller = sv.RichLabelAnnotator(
        PALETTE,
        text_color=sv.Color.BLACK,
        font_path=font_file(letters),
        font_size=font_size,
        text_padding=font_size // 4,
        text_offset=(-reach, -reach),
        smart_position=True,
    )
    return labeller.annotate(canvas, found, texts)


def draw_panoptic(
    image: Image.Image,
    ids: NDArray[np.int32],
    labels: Mapping[int, str],
    *,
    classes: Sequence[str] = (),
    enlarge: bool = True,
) -> Image.Image:
    """An RGB copy of a picture with its segments tinted, black lines between them, and their names.

    Args:
        ids: (height, width) of the picture, the id of every pixel's segment; other ids are not tinted.
        labels: id -> class name of each segment. classes, enlarge: as for `draw_boxes`.
    """
    scale = _scale_of(image, enlarge)
    canvas = ImageOps.scale(as_rgb(image), scale, Image.Resampling.LANCZOS)
    ids = ids.repeat(scale, 0).repeat(scale, 1)
    colors = _colors_of([*labels.values()], classes)
    paint = sv.MaskAnnotator(PALETTE, opacity=PANOPTIC_OPACITY)
    font_size = max(12, round(0.026 * math.sqrt(canvas.width * canvas.height)))
    texts, middles = [], []
    for number, name, color in zip(labels, labels.values(), colors, strict=True):
        mask = ids == number
        rows, columns = mask.nonzero()
        if not len(rows):
            continue
        paint.annotate(canvas, sv.Detections(np.zeros((1, 4)), mask=mask[None], class_id=np.array([color])))
        # a pixel of the segment, which the mean of a bent one need not be
        near = np.argmin(np.abs(rows - rows.mean()) + np.abs(columns - columns.mean()))
        texts.append(name)
        middles.append((int(columns[near]), int(rows[near])))

    border = np.zeros(ids.shape, bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    canvas.paste("black", mask=Image.fromarray(border))
    pen, font = ImageDraw.Draw(canvas), _font("".join(texts), font_size)
    for text, middle in zip(texts, middles, strict=True):
        text = _shorten(text, "", font, MAX_LABEL * font_size)
        pen.text(middle, text, "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
    return canvas


def _scale_of(image: Image.Image, enlarge: bool) -> int:
    """Small pictures are enlarged, because letters would hide their objects."""
    return math.ceil(MIN_SIDE / max(image.size)) if enlarge else 1


def _colors_of(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int_]:
    """A number for each label. That of an unknown class follows from its letters."""
    places = {name: place for place, name in reversed(list(enumerate(classes)))}
    return np.array([places.get(label, zlib.crc32(label.encode(errors="replace"))) for label in labels], int)


def _draw_masks(
    canvas: Image.Image,
    masks: Iterable[ArrayLike],
    order: NDArray[np.intp],
    colors: NDArray[np.int_],
    scale: int,
    line: int,
) -> None:
    """Tint the masks in `order`, the last on top, and draw a line within what is seen of each, with a
    black edge around it. colors: of all n masks; line: its width in pixels.
    """
    # which mask is seen at each pixel, as its place in the order; one mask at a time is in memory
    places = {int(i): place for place, i in enumerate(order)}
    seen = np.full((canvas.height // scale, canvas.width // scale), -1, np.int16)
    for i, mask in enumerate(masks):
        if i in places:
            seen[np.asarray(mask, dtype=bool) & (seen < places[i])] = places[i]
    seen = seen.repeat(scale, 0).repeat(scale, 1)

    # at the border of the picture a mask is cut, and has no line
    def near(width: int) -> NDArray[np.bool_]:
        around = {"size": 2 * width + 1, "mode": "nearest"}
        return ndimage.maximum_filter(seen, **around) != ndimage.minimum_filter(seen, **around)

    inside = seen >= 0
    opacity = np.where(inside, MASK_OPACITY, 0.0)
    opacity[near(line) & inside | near(1) & ~inside] = 1
    rgb = [PALETTE.by_idx(int(color)).as_rgb() for color in colors[order]]
    paint = np.array([*rgb, (0, 0, 0)], np.uint8)[seen]  # -1, for no mask, is the last
    canvas.paste(Image.fromarray(paint), mask=Image.fromarray(np.uint8(255 * opacity)))


def draw_coco(
    image: Image.Image,
    entries: Sequence[Mapping],
    names: Mapping[int, str],
    masks: Iterable[ArrayLike] | None = None,
) -> Image.Image:
    """Draw COCO annotations, or COCO results, which have a score. `names`: category id -> name; `masks`
    of the entries are drawn if they are given.
    """
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [names.get(entry["category_id"], f"class {entry['category_id']}") for entry in entries]
    scores = None
    if all("score" in entry for entry in entries):
        scores = [entry["score"] for entry in entries]
    crowd = [bool(entry.get("iscrowd")) for entry in entries]
    classes = [names[i] for i in sorted(names)]
    return draw_boxes(image, boxes, labels, scores, classes=classes, crowd=crowd, masks=masks)


def _lines_around(
    boxes: NDArray[np.float64], size: tuple[int, int], reach: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where lines lie around the objects but within the picture, (n, 4); which boxes are in the
    picture, (n,).
    """
    # sorted, because corners may be swapped
    low, high = np.sort(boxes.reshape(-1, 2, 2), axis=1).swapaxes(0, 1)
    lines = np.concatenate([np.floor(low) - 1 - reach, np.ceil(high) + reach], axis=1)
    lines = np.clip(np.nan_to_num(lines), reach, np.tile(size, 2) - 1 - reach)
    return lines, (low < size).all(axis=1) & (high >= 0).all(axis=1)  # False for NaN


def _shorten(name: str, rest: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`name + rest` in one line; the name is cut to make it at most `width` pixels wide."""
    name = " ".join(name.split())
    text, keep = name + rest, len(name)
    while keep > 1 and font.getlength(text) > width:
        keep -= 1
        text = f"{name[:keep].rstrip()}…{rest}"
    return text


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    if path := font_file(text):
        return ImageFont.truetype(path, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow has FreeType in all its builds
    return font


def font_file(text: str) -> str | None:
    """The font of this machine with most letters of `text`; None for ASCII, which any font has."""
    if text.isascii():
        return None
    return _font_file(frozenset(map(ord, text)))


@cache
def _font_file(letters: frozenset[int]) -> str:
    from matplotlib import font_manager, ft2font

    best, most = "", -1
    for path in (font_manager.findfont("DejaVu Sans"), *sorted(font_manager.findSystemFonts())):
        try:
            known = len(letters & ft2font.FT2Font(path).get_charmap().keys())
        except (OSError, RuntimeError):  # a damaged file
            continue
        if known > most:
            best, most = path, known
        if most == len(letters):
            break
    return best


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures on white paper, each under its title. A title too long for its picture is
    shortened.
    """
    wider = max(left.width, right.width)
    font = _font("".join(titles), max(14, round(0.026 * wider)))
    cells = []
    for image, title in zip((left, right), titles, strict=True):
        cell = ImageOps.expand(image.convert("RGB"), (0, sum(font.getmetrics()), 0, 0), "white")
        ImageDraw.Draw(cell).text((0, 0), _shorten(title, "", font, image.width), "black", font)
        cells.append(cell)
    return contact_sheet(cells, 2, widest=wider)


def contact_sheet(pictures: Sequence[Image.Image], columns: int, widest: int = MAX_CELL) -> Image.Image:
    """One or more pictures in rows on white paper. Those wider than `widest` pixels are reduced."""
    cells = [image.convert("RGB") for image in pictures]
    for cell in cells:
        cell.thumbnail((widest, cell.height), Image.Resampling.LANCZOS)

    # Columns are equally wide, rows as high as their highest picture.
    width = max(cell.width for cell in cells)
    gap = max(8, width // 100)
    page = Image.new("RGB", (min(columns, len(cells)) * (width + gap) + gap, gap), "white")
    for i in range(0, len(cells), columns):
        row, top = cells[i : i + columns], page.height
        page = ImageOps.expand(page, (0, 0, 0, max(cell.height for cell in row) + gap), "white")
        for column, cell in enumerate(row):
            page.paste(cell, (gap + column * (width + gap), top))
    return page
