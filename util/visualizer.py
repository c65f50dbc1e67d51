"""Pictures of detections: boxes with class and score, pairs of pictures, contact sheets. PIL and numpy, no torch.

Legend: n boxes, m candidate places of one tag, k colours. A rectangle is x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from util.images import as_rgb

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MIN_SIDE = 480  # below this, letters would be as large as the objects
MAX_CELL = 1400  # a contact sheet of photographs from a phone should still open
INK, PAPER = (20, 20, 20), (255, 255, 255)

# Okabe and Ito's colours, which people with any common colour vision tell apart
OKABE_ITO: tuple[Color, ...] = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178),
)
# linear RGB as a normal, a red-blind and a green-blind eye receive it (Machado, Oliveira and Fernandes, 2009)
_VISIONS = np.array([
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
])
# linear RGB -> cone responses -> OKLab, where Euclidean distance is roughly what the eye sees (Ottosson, 2020)
_RGB_TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])
_CONES_TO_OKLAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])


# ---- colours ----


def perceived(colors: ArrayLike) -> NDArray[np.float64]:
    """Colours as eyes see them: (k, 3) RGB in 0..255 -> (3, k, 3) OKLab for normal, red-blind and green-blind eyes."""
    linear = _linear_rgb(colors)
    seen = np.clip(np.einsum("vij,kj->vki", _VISIONS, linear), 0, 1)
    return np.cbrt(seen @ _RGB_TO_CONES.T) @ _CONES_TO_OKLAB.T


def luminance(colors: ArrayLike) -> NDArray[np.float64]:
    """Relative luminance of (..., 3) RGB colours: 0 for black, 1 for white."""
    return _linear_rgb(colors) @ np.array([0.2126, 0.7152, 0.0722])


def _linear_rgb(colors: ArrayLike) -> NDArray[np.float64]:
    srgb = np.asarray(colors, dtype=np.float64) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@cache
def palette(count: int) -> tuple[Color, ...]:
    """`count` colours; a shorter palette is the beginning of a longer one, so adding a class recolours none.

    After Okabe and Ito's seven, each is the candidate farthest from all before it for the eye that tells them apart
    worst. Past the candidates (over 1000) the colours repeat.
    """
    colors = list(OKABE_ITO)
    candidates = _candidate_colors()
    seen = perceived(candidates)
    nearest = _distance_to(seen, OKABE_ITO)
    while len(colors) < min(count, len(candidates)):
        colors.append(candidates[int(nearest.argmax())])
        nearest = np.minimum(nearest, _distance_to(seen, colors[-1:]))
    return tuple(colors[i % len(colors)] for i in range(count))


def _candidate_colors() -> list[Color]:
    """Vivid colours on a grid, neither so dark nor so light that they fade on a black or a white picture."""
    steps = np.linspace(0, 255, 16).round().astype(int)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    light = luminance(grid)
    vivid = np.linalg.norm(perceived(grid)[0, :, 1:], axis=-1) > 0.1
    return [tuple(color) for color in grid[vivid & (light > 0.18) & (light < 0.8)].tolist()]


def _distance_to(seen: NDArray[np.float64], colors: Sequence[Color]) -> NDArray[np.float64]:
    """(3, m, 3) perceived candidates -> (m,): distance to the nearest of `colors` for the worst eye."""
    nearest = np.linalg.norm(seen[:, :, None] - perceived(colors)[:, None], axis=-1).min(axis=2)
    return (nearest * np.array([[0.5], [1], [1]])).min(axis=0)  # most eyes are normal: they get twice the distance


def class_colors(names: Sequence[str]) -> dict[str, Color]:
    """A colour for each class of a data set, by its place in `names`: pass the whole list, in a fixed order."""
    unique = list(dict.fromkeys(names))
    return dict(zip(unique, palette(len(unique)), strict=True))


def _colors_by_name(labels: Sequence[str]) -> dict[str, Color]:
    """Colours where the list of classes is unknown: by a hash of the name, moved on where two names meet."""
    slots = 2 * max(64, len(set(labels)))
    taken: dict[int, str] = {}
    for name in sorted(set(labels)):
        slot = zlib.crc32(name.encode()) % slots  # Python's own hash changes from run to run
        while slot in taken:
            slot = (slot + 1) % slots
        taken[slot] = name
    colors = palette(slots)
    return {name: colors[slot] for slot, name in taken.items()}


# ---- boxes ----


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels of the drawn picture. The dark casing on both sides of a line keeps it visible on any ground."""

    line: int
    casing: int
    font_size: int

    @property
    def border(self) -> int:
        return self.line + 2 * self.casing


def _style_for(size: tuple[int, int]) -> _Style:
    short = min(size)
    long = min(max(size), 4 * short)  # a panorama is drawn by its height
    font_size = min(max(12, round(0.021 * long)), max(8, short // 5))
    return _Style(max(2, round(long / 320)), max(1, round(long / 1000)), font_size)


def display_scale(size: tuple[int, int]) -> int:
    """The whole factor by which `draw_boxes` enlarges a picture of `size`, so that its longer side has 480 pixels."""
    return -(-MIN_SIDE // max(size))


def draw_boxes(
    image: Image.Image,
    boxes: ArrayLike,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    colors: Mapping[str, Color] | None = None,
    crowd: Sequence[bool] | None = None,
    enlarge: bool = True,
) -> Image.Image:
    """Draw boxes with a tag of class and score each.

    Args:
        image: any mode, as the detector takes it (util.images.as_rgb); it stays as it is.
        boxes: (n, 4) x0, y0, x1, y1 in pixels of `image`. They are cut at its border, swapped corners are put in
            order, and a box that is NaN or wholly outside is left out. An empty list is no boxes.
        labels: n class names. A name too long for the picture is shortened.
        scores: n numbers, or None for ground truth.
        colors: class name -> colour, as `class_colors` gives. None: a colour by the name alone.
        crowd: n flags; a crowd region is dashed and hatched.
        enlarge: a small picture, so that tags are small beside its objects.

    Returns:
        an RGB picture `display_scale(image.size)` times the size of `image`; without `enlarge` as large as `image`.

    Raises:
        ValueError: the image is none, the lengths disagree, `boxes` is not (n, 4), or `colors` lacks a label.
    """
    boxes, scores, crowd = _checked(boxes, labels, scores, crowd)
    colors = _colors_by_name(labels) if colors is None else colors
    if missing := sorted(set(labels) - set(colors)):
        raise ValueError(f"colors has none for {', '.join(missing)}")
    scale = display_scale(image.size) if enlarge else 1
    canvas = as_rgb(image)
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.LANCZOS)
    boxes, kept = _visible(boxes * scale, canvas.size)
    style = _style_for(canvas.size)
    inks = [colors[labels[i]] for i in kept]
    for i in np.argsort(-_area(boxes), kind="stable"):  # the small ones last, else large ones would hide them
        (_draw_crowd if crowd[kept[i]] else _draw_outline)(canvas, boxes[i], inks[i], style)
    texts = [_tag_parts(labels[i], None if scores is None else scores[i], crowd[i]) for i in kept]
    strength = None if scores is None else np.asarray(scores, dtype=np.float64)[kept]
    _draw_tags(canvas, boxes, texts, inks, style, strength)
    return canvas


def _checked(
    boxes: ArrayLike, labels: Sequence[str], scores: Sequence[float] | None, crowd: Sequence[bool] | None
) -> tuple[NDArray[np.float64], Sequence[float] | None, Sequence[bool]]:
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (n, 4), not {boxes.shape}")
    crowd = [False] * len(boxes) if crowd is None else crowd
    for name, values in (("labels", labels), ("scores", scores), ("crowd", crowd)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{len(boxes)} boxes but {len(values)} {name}")
    return boxes, scores, crowd


def _visible(boxes: NDArray[np.float64], size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """The boxes (n, 4) cut to the picture, corners in order, and the indices of those that were kept."""
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    inside = (boxes[:, :2] < size).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)  # false for NaN
    kept = np.flatnonzero(inside)
    return np.clip(boxes[kept], 0, np.tile(size, 2)), kept


def _area(rects: NDArray[np.float64]) -> NDArray[np.float64]:
    return (rects[..., 2] - rects[..., 0]) * (rects[..., 3] - rects[..., 1])


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m, 4), (n, 4) -> (m, n): the areas that the rectangles share, in square pixels."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1)


def _frame(box: NDArray[np.float64], size: tuple[int, int], border: int) -> tuple[int, int, int, int]:
    """The outer rectangle of a line around the box: outside it, so that a small object stays uncovered, but never
    outside the picture, where a box as large as the picture would lose its line."""
    x0, y0 = np.floor(box[:2]).astype(int) - border
    x1, y1 = np.ceil(box[2:]).astype(int) + border
    return max(0, int(x0)), max(0, int(y0)), min(size[0], int(x1)), min(size[1], int(y1))


def _draw_outline(canvas: Image.Image, box: NDArray[np.float64], color: Color, style: _Style) -> None:
    x0, y0, x1, y1 = _frame(box, canvas.size, style.border)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=INK, width=style.border)
    inset = style.casing
    if min(x1 - x0, y1 - y0) > 2 * inset:
        draw.rectangle((x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset), outline=color, width=style.line)


def _draw_crowd(canvas: Image.Image, box: NDArray[np.float64], color: Color, style: _Style) -> None:
    """Dashes on a dark frame, and thin slanted lines over the region that leave what is below to see."""
    x0, y0, x1, y1 = _frame(box, canvas.size, style.border)
    y, x = np.mgrid[y0:y1, x0:x1]
    edge = np.minimum(np.minimum(x - x0, x1 - 1 - x), np.minimum(y - y0, y1 - 1 - y))
    dash = (x + y) % (10 * style.line) < 6 * style.line
    slant = (x + y) % (10 * style.line)
    hatch = edge >= style.border
    ink = np.where(edge < style.border, 255, np.where(hatch & (abs(slant - style.line) == style.line), 90, 0))
    paint = (edge >= style.casing) & (edge < style.casing + style.line) & dash
    tint = np.where(paint, 255, np.where(hatch & (slant < 2 * style.line) & (slant > 0), 110, 0))
    for fill, mask in ((INK, ink), (color, tint)):
        canvas.paste(fill, (x0, y0, x1, y1), Image.fromarray(mask.astype(np.uint8)))


# ---- letters ----


def font_file(text: str) -> str | None:
    """A file of a font that has all letters of `text`, where there is one on this machine; None if any font does."""
    letters = frozenset(letter for letter in text if letter > "~" and letter != "…")
    return _font_file(letters) if letters else None


def _font(size: float, text: str) -> Font:
    path = font_file(text)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def _is_default(font: Font) -> bool:
    return not isinstance(getattr(font, "path", None), str)


@cache
def _font_file(letters: frozenset[str]) -> str | None:
    """The file of the font that has most of `letters`: Matplotlib's own (Latin, Greek, Cyrillic), else one of the system's."""
    from matplotlib import font_manager, get_data_path

    best, most = None, 0
    for path in (f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", *sorted(font_manager.findSystemFonts())):
        if (count := _letters_in(path, letters)) > most:
            best, most = path, count
        if most == len(letters):
            break
    return best


def _letters_in(path: str, letters: frozenset[str]) -> int:
    """How many of `letters` a font draws."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        ImageFont.truetype(path, 12)
        with TTFont(path, fontNumber=0, lazy=True) as font:
            known = font.getBestCmap() or {}
    except (OSError, TTLibError):  # a font that can't be used is none
        return 0
    return sum(ord(letter) in known for letter in letters)


# ---- tags ----


def _tag_parts(label: str, score: float | None, crowd: bool) -> tuple[str, str]:
    """The name, which may be shortened, and what follows it, which may not."""
    name = " ".join(str(label).split())
    return name, (" (crowd)" if crowd else "") + ("" if score is None else f" {score:.2f}")


def _shorten(name: str, rest: str, font: Font, width: float) -> str:
    """`name + rest`, the name cut at its end so that all is at most `width` pixels wide where that can be."""
    if font.getlength(name + rest) <= width:
        return name + rest
    keep = len(name)
    while keep > 1 and font.getlength(name[:keep].rstrip() + "…" + rest) > width:
        keep -= 1
    return name[:keep].rstrip() + "…" + rest


def _draw_tags(
    canvas: Image.Image,
    boxes: NDArray[np.float64],
    texts: Sequence[tuple[str, str]],
    inks: Sequence[Color],
    style: _Style,
    strength: NDArray[np.float64] | None,
) -> None:
    if not len(boxes):
        return
    font, words, rects = _lay_out(boxes, texts, canvas.size, style)
    order = range(len(boxes)) if strength is None else np.argsort(strength, kind="stable")  # the surest on top
    for i in order:
        if not np.isnan(rects[i]).any():
            _draw_tag(canvas, rects[i], words[i], inks[i], font, style)


def _lay_out(
    boxes: NDArray[np.float64], texts: Sequence[tuple[str, str]], size: tuple[int, int], style: _Style
) -> tuple[Font, list[str], NDArray[np.float64]]:
    """Font, words and rectangles (n, 4) of the tags. In a crowded picture the letters shrink until tags fit apart."""
    best = None
    for shrink in (1.0, 0.85, 0.7):
        font = _font(max(style.font_size * shrink, min(style.font_size, 10)), "".join(name for name, _ in texts))
        # in a crowd long names give way, too: one takes the room of three others
        room = shrink**2 * min(max(0.45 * size[0], 16 * style.font_size), 24 * style.font_size)
        longest = min(size[0], room) - _tag_size("", font)[0]
        words = [_shorten(name, rest, font, longest) for name, rest in texts]
        rects = place_tags(boxes, np.array([_tag_size(word, font) for word in words]), size, style.border)
        hidden = np.nan_to_num(np.triu(_overlap(rects, rects), k=1) / _area(rects))  # (n, n): shares of each tag
        if best is None or hidden.sum() < best[0]:
            best = hidden.sum(), (font, words, rects)
        if hidden.max() < 0.1:  # edges that touch hide no letter
            break
    return best[1]


def _tag_size(word: str, font: Font) -> tuple[int, int]:
    rise, fall = _letter_height(font)
    pad = max(2, round(0.4 * rise))
    return round(font.getlength(word)) + 2 * pad, rise + fall + 2 * pad


def _letter_height(font: Font) -> tuple[int, int]:
    """How far letters reach above and below their line; the font's own metrics add space that looks off-centre."""
    _, top, _, bottom = font.getbbox("dg" if _is_default(font) else "dgÉ", anchor="ls")
    return -round(top), round(bottom)


def place_tags(
    boxes: NDArray[np.float64], tags: NDArray[np.int64], size: tuple[int, int], border: int
) -> NDArray[np.float64]:
    """Find a place for each tag beside, or in, its own box.

    Args:
        boxes: (n, 4) rectangles inside the picture.
        tags: (n, 2) width and height of the tags.
        size: width and height of the picture.
        border: width of the line around a box.

    Returns:
        (n, 4) rectangles inside the picture; NaN for a tag larger than the picture.
    """
    placed = np.full((len(boxes), 4), np.nan)
    choices = [_places(box, tag, size, border) for box, tag in zip(boxes, tags, strict=True)]
    fits = np.array([len(places) > 0 for places in choices], dtype=bool)
    wished = np.array([places[0] if len(places) else np.full(4, np.nan) for places in choices]).reshape(-1, 4)
    waiting, done = fits.copy(), np.zeros_like(fits)
    for i in np.argsort(_area(boxes), kind="stable"):  # a small box leaves fewer places, so it chooses first
        if fits[i]:
            waiting[i] = False
            others = np.delete(boxes, i, axis=0)
            cost = _place_cost(choices[i], boxes[i], others, placed[done], wished[waiting])
            placed[i], done[i] = choices[i][cost.argmin()], True
    return placed


def _places(
    box: NDArray[np.float64], tag: NDArray[np.int64], size: tuple[int, int], border: int
) -> NDArray[np.float64]:
    """(m, 4) places for a tag, the best liked first, all inside the picture."""
    (x0, y0), (x1, y1), (w, h) = np.floor(box[:2]) - border, np.ceil(box[2:]) + border, tag
    along = [x0, x1 - w, (x0 + x1 - w) / 2, x0 - w / 2, x1 - w / 2]
    corners = [(x, y0 - h) for x in along[:2]] + [(x0, y0), (x0, y1), (x1 - w, y1), (x1 - w, y0)]
    corners += [(x0, y1 - h), (x1 - w, y1 - h)]
    corners += [(x, y) for y in (y0 - h, y1, y0, y1 - h) for x in along]
    corners += [(x, y) for x in (x1, x0 - w) for y in (y0, y1 - h, (y0 + y1 - h) / 2)]
    corners += [(x, y) for row in (1, 2) for y in (y0 - (row + 1) * h, y1 + row * h, y0 + row * h) for x in along[:3]]
    corners = np.array(corners).round()
    room = np.array(size) - tag
    corners = np.clip(corners, 0, room)  # a box at the border has its tag pushed back into the picture
    return np.concatenate([corners, corners + tag], axis=1) if (room >= 0).all() else np.empty((0, 4))


def _place_cost(
    places: NDArray[np.float64],
    box: NDArray[np.float64],
    other_boxes: NDArray[np.float64],
    done: NDArray[np.float64],
    wished: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(m,): how bad each place is. A tag on a tag is worst, next the own object hidden, next other objects hidden.

    `done` are the tags that have their place. `wished` are the first choices of the boxes that wait for theirs: a tag
    there would seem to belong to them.
    """
    on_tags = _overlap(places, done).sum(axis=1) / _area(places)
    on_wishes = _overlap(places, wished).sum(axis=1) / _area(places)
    hides_own = (_overlap(places, box[None]) / max(_area(box), 1)).sum(axis=1)
    hides_others = (_overlap(places, other_boxes) / np.maximum(_area(other_boxes), 1)).sum(axis=1)
    return 20 * on_tags + 10 * hides_own + 2 * hides_others + 0.5 * on_wishes + 0.02 * np.arange(len(places))


def _draw_tag(
    canvas: Image.Image, rect: NDArray[np.float64], word: str, color: Color, font: Font, style: _Style
) -> None:
    x0, y0, x1, y1 = (int(value) for value in rect)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=color, outline=INK, width=style.casing)
    ink = INK if luminance(color) > 0.21 else PAPER  # both contrast 4:1 there; on pure red and blue white reads better
    rise, fall = _letter_height(font)
    middle = (y0 + y1 + rise - fall // 2) // 2  # most words have few letters that reach below their line
    draw.text(((x0 + x1) // 2, middle), word, fill=ink, font=font, anchor="ms")


# ---- pages ----


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures on white paper, each under its title, tops aligned. A title too long for its picture is cut."""
    gap = max(8, round(0.012 * max(left.width, right.width)))
    font = _font(max(14, round(0.026 * max(left.width, right.width))), "".join(titles))
    top = sum(font.getmetrics()) + gap
    page = Image.new("RGB", (left.width + right.width + 3 * gap, max(left.height, right.height) + top + gap), PAPER)
    draw = ImageDraw.Draw(page)
    for image, title, x in ((left, titles[0], gap), (right, titles[1], left.width + 2 * gap)):
        draw.text((x, top / 2), _shorten(title, "", font, image.width), fill=INK, font=font, anchor="lm")
        page.paste(image.convert("RGB"), (x, top))
    return page


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows and columns on white paper. Rows may differ in length; wider than 1400 pixels are reduced.

    Raises:
        ValueError: there is no picture.
    """
    cells = [[_reduced(image) for image in row] for row in rows if row]
    if not cells:
        raise ValueError("a contact sheet needs at least one picture")
    columns = range(max(map(len, cells)))
    widths = [max(row[i].width for row in cells if i < len(row)) for i in columns]
    heights = [max(image.height for image in row) for row in cells]
    gap = max(8, max(widths) // 100)
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(heights) + 1)), PAPER)
    for j, row in enumerate(cells):
        for i, image in enumerate(row):
            left = sum(widths[:i]) + gap * (i + 1) + (widths[i] - image.width) // 2
            sheet.paste(image, (left, sum(heights[:j]) + gap * (j + 1)))
    return sheet


def _reduced(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    if image.width <= MAX_CELL:
        return image
    height = max(1, round(image.height * MAX_CELL / image.width))
    return image.resize((MAX_CELL, height), Image.Resampling.LANCZOS)
