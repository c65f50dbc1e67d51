"""Pictures of deformable attention: where a query or a token samples an image. No torch.

Shape letters: M heads, L levels, P sampling points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image

from util.draw.boxes import font_file

Box = tuple[float, float, float, float]  # x0, y0, x1, y1

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 110,
}
WEIGHTS = mpl.colormaps["plasma"]
# Okabe and Ito's colours that letters can be read on; with more levels they repeat
LEVEL_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#999999")
QUERY_COLOR, REFERENCE_COLOR, REGION_COLOR = "#00E5FF", "#FFFFFF", "#FFD400"
SOLID, DASHED, DOTTED = (0, ()), (0, (3, 3)), (0, (1, 1.5))  # line styles of matplotlib
PANEL = 3.4  # inches, the longer side of an image
SHOWN = 800  # pixels, twice what a panel has
ZOOM_BELOW = 0.6  # a region smaller than this part of the image is shown enlarged


@dataclass(frozen=True)
class Samples:
    """What one query, or one token, looks at in one layer; places are in pixels of the picture.

    points: [M, L, P, 2] x, y; weights: [M, L, P], the sum over levels and points is 1 for every
    head; reference: a point [2] x, y or a box [4] centre and size; outcome: the box that the query
    gave in the end, or the cell of the token; shapes: (height, width) of the levels.
    """

    points: NDArray[np.float64]
    weights: NDArray[np.float64]
    reference: NDArray[np.float64]
    outcome: Box
    outcome_name: str
    shapes: Sequence[tuple[int, int]]


def plot_samples(picture: Image.Image, samples: Samples, title: str, heads: Sequence[int]) -> Figure:
    """The samples on the whole picture, enlarged for every level, and the weight of each level.

    Args:
        picture: RGB.
        heads: draw the samples of these alone.
    """
    levels = range(len(samples.shapes))
    region = _region(samples, heads, picture.size)
    highest = float(samples.weights[heads].max())
    scale = Normalize(0, max(highest, 1e-9))

    # a page of equal panels
    columns, rows, width, height = _grid(len(levels) + 2, picture.size)
    with mpl.rc_context(STYLE):
        figure = page((max(columns * (width + 0.25), 6.5), rows * (height + 0.55) + 1.3), title)
        cells = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        overview, *panels = cells[: len(levels) + 1]
        shares, *empty = cells[len(levels) + 1 :]
        for axes in empty:
            axes.set_axis_off()

        # the whole picture, with the part that the panels of the levels enlarge
        everything = (0.0, 0.0, float(picture.width), float(picture.height))
        shrink = 0.3 if region else 1.0
        _draw_samples(overview, picture, samples, heads, levels, scale, everything, shrink)
        overview.set_title("all levels\n")
        if region:
            _draw_boxes(overview, [(region, REGION_COLOR, DOTTED)])
        for level, axes in zip(levels, panels, strict=True):
            _draw_samples(axes, picture, samples, heads, [level], scale, region or everything, 1.0)
            axes.set_title(_level_title(samples, level, heads, region or everything))
        _draw_shares(shares, samples, heads)

        color_bar(figure, cells, scale, WEIGHTS, "weight of a sampling point (those of a head sum to 1)")
        columns = max(1, int(figure.get_figwidth() / 1.8))  # of the legend
        figure.legend(handles=_sample_legend(samples, region), loc="outside lower left", ncols=columns)
    return figure


def page(size: tuple[float, float], title: str) -> Figure:
    """An empty figure of (width, height) inches."""
    figure = Figure(figsize=size, layout="constrained")
    # class names come in any alphabet
    font = FontProperties(fname=font_file(title), weight="bold", size=11)
    figure.suptitle(title, x=0.01, ha="left", fontproperties=font, parse_math=False)
    return figure


def color_bar(figure: Figure, cells: Any, scale: Normalize, colors: Colormap, label: str) -> Axes:
    """A colour bar at the right of `cells`, which keep their anchors."""
    mapping = ScalarMappable(scale, colors)
    bar = figure.colorbar(mapping, ax=cells, shrink=0.8, aspect=30, pad=0.01, panchor=False)
    bar.set_label(label)
    return bar.ax


def _region(samples: Samples, heads: Sequence[int], size: tuple[int, int]) -> Box | None:
    """The part of the picture with the query and its points, in the picture's proportions.

    None if it is most of the picture.
    """
    points, weights = samples.points[heads].reshape(-1, 2), samples.weights[heads].flatten()
    counted = points[weights > 0.1 * weights.max()]
    corners = np.concatenate([counted, np.reshape(samples.outcome, (2, 2)), samples.reference[None, :2]])
    corners = np.clip(corners, 0, size)

    # a margin around them; not so small that the picture's pixels fill the panel
    part = max((1.15 * np.ptp(corners, axis=0) / size).max(), 0.08)
    if part > ZOOM_BELOW:
        return None
    half = part * np.array(size) / 2
    x, y = np.clip((corners.min(0) + corners.max(0)) / 2, half, size - half).tolist()
    return x - half[0], y - half[1], x + half[0], y + half[1]


def _grid(cells: int, size: tuple[int, int]) -> tuple[int, int, float, float]:
    """Columns and rows that leave few places empty on a page of about 4 : 3; width and height of a
    panel in inches. `size` is the picture's; a panorama gets room for a title.
    """
    proportion = size[0] / size[1]
    width, height = max(PANEL * min(1, proportion), 2.2), max(PANEL * min(1, 1 / proportion), 1.2)

    def badness(columns: int) -> float:
        rows = -(-cells // columns)
        return abs(math.log(columns * width / (rows * height) * 3 / 4)) + 0.4 * (rows * columns - cells)

    columns = min(range(1, cells + 1), key=badness)
    return columns, -(-cells // columns), width, height


def _draw_samples(
    axes: Axes,
    picture: Image.Image,
    samples: Samples,
    heads: Sequence[int],
    levels: Sequence[int],
    scale: Normalize,
    region: Box,
    shrink: float,
) -> None:
    _show(axes, picture, region)

    # the boxes below the points
    boxes: list[tuple[Box, str, Any]] = [(samples.outcome, QUERY_COLOR, SOLID)]
    if len(samples.reference) == 4:
        x, y, w, h = samples.reference.tolist()
        boxes.append(((x - w / 2, y - h / 2, x + w / 2, y + h / 2), REFERENCE_COLOR, DASHED))
    _draw_boxes(axes, boxes)

    # the heavy points on top; each with its rings, so that one on another hides it as a whole
    points = samples.points[np.ix_(heads, levels)].reshape(-1, 2)
    weights = samples.weights[np.ix_(heads, levels)].flatten()
    order = np.argsort(weights)
    points, weights = points[order], weights[order]

    # discs whose area and colour are the weight, in a white ring in a black one, seen on any ground
    sizes = 8 + 62 * weights / float(scale.vmax or 1)
    radii = np.sqrt(sizes)[:, None] * shrink + np.array([2.4, 1.2, 0]) * shrink**0.5
    rings = np.broadcast_to([to_rgba("black"), to_rgba("white")], (len(points), 2, 4))
    colors = np.concatenate([rings, WEIGHTS(scale(weights))[:, None]], 1)
    x, y = np.repeat(points, 3, 0).T
    axes.scatter(x, y, s=radii.flatten() ** 2, c=colors.reshape(-1, 4), linewidths=0, zorder=3)

    # the reference point
    x, y = samples.reference[:2]
    axes.plot(x, y, "+", color="black", markersize=11, markeredgewidth=3.6, zorder=5)
    axes.plot(x, y, "+", color="white", markersize=9, markeredgewidth=1.6, zorder=5)


def _draw_boxes(axes: Axes, boxes: Sequence[tuple[Box, str, Any]]) -> None:
    """Boxes in colour and line style, each on black."""

    def draw(box: Box, **look: Any) -> None:
        x0, y0, x1, y1 = box
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, zorder=2, **look))

    # all black first: of two boxes in one place both are seen
    for box, _, _ in boxes:
        draw(box, edgecolor="black", linewidth=3.2)
    for box, color, line in boxes:
        draw(box, edgecolor=color, linewidth=1.6, linestyle=line)


def _show(axes: Axes, picture: Image.Image, region: Box) -> None:
    """The `region` of the picture, on axes in pixels of the whole picture, without ticks."""
    x0, y0, x1, y1 = region
    rim = 0.025 * max(x1 - x0, y1 - y0)  # a point on the border is not cut
    left, top = max(math.floor(x0 - rim), 0), max(math.floor(y0 - rim), 0)
    right, bottom = min(math.ceil(x1 + rim), picture.width), min(math.ceil(y1 + rim), picture.height)

    # several panels of a photograph at full size would take much memory
    part = picture.crop((left, top, right, bottom))
    part.thumbnail((SHOWN, SHOWN))
    axes.imshow(part, extent=(left, right, bottom, top), interpolation="bicubic")

    axes.set(xlim=(x0 - rim, x1 + rim), ylim=(y1 + rim, y0 - rim), xticks=[], yticks=[])
    axes.set(aspect="equal", anchor="NW", facecolor="0.9")
    axes.spines[:].set_visible(False)


def _level_title(samples: Samples, level: int, heads: Sequence[int], region: Box) -> str:
    height, width = samples.shapes[level]
    share = samples.weights[heads, level].sum() / len(heads)
    title = f"level {level}, {width} x {height}\n{share:.0%} of the weight"

    # points beyond the panel's border are not seen
    points = samples.points[heads, level].reshape(-1, 2)
    x0, y0, x1, y1 = region
    seen = ((points >= (x0, y0)) & (points <= (x1, y1))).all(1)
    if seen.all():
        return title
    return f"{title}, {np.sum(~seen)}/{len(points)} points outside"


def _draw_shares(axes: Axes, samples: Samples, heads: Sequence[int]) -> None:
    """A bar for the mean of the heads, and one for every head, divided by levels."""
    by_head = samples.weights.sum(-1)  # [M, L]
    shares = np.concatenate([by_head[heads].mean(0)[None], by_head])
    names = ["mean", *(f"head {head}" for head in range(len(by_head)))]
    places = np.arange(len(names)) + 0.4
    places[0] = 0  # the mean stands apart

    # level after level, each at the end of the one before; heads that are not drawn are pale
    opacity = np.full(len(names), 0.3)
    opacity[[0, *(1 + head for head in heads)]] = 1
    ends = shares.cumsum(1)
    handles = []
    for level, part in enumerate(shares.T):
        color = LEVEL_COLORS[level % len(LEVEL_COLORS)]
        handles.append(Patch(color=color, label=str(level)))
        left = ends[:, level] - part
        axes.barh(places, part, left=left, height=0.8, color=[to_rgba(color, alpha) for alpha in opacity])
        for place, start, width in zip(places, left, part, strict=True):
            if width >= 0.12:  # the text fits
                axes.text(start + width / 2, place, f"{width:.0%}", ha="center", va="center", fontsize=7)

    for place, name in zip(places, names, strict=True):
        axes.text(-0.03, place, name, ha="right", va="center", fontsize=8)
    axes.set(xlim=(-0.28, 1), xticks=[], yticks=[], title="share of the weight\nby level")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.legend(
        handles=handles,
        title="level",
        title_fontsize=8,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(0.2, -0.01),
        ncols=min(len(handles), 4),
        handlelength=1,
        columnspacing=1,
        alignment="left",
        borderpad=0,
    )


def _sample_legend(samples: Samples, region: Box | None) -> list[Line2D]:
    lines: list[tuple[str, str, Any]] = [(samples.outcome_name, QUERY_COLOR, "-")]
    if len(samples.reference) == 4:
        lines.append(("reference box", "0.5", "--"))
    if region:
        lines.append(("part shown enlarged", REGION_COLOR, ":"))

    # the marks before the lines
    point = Line2D([], [], marker="o", linestyle="", color=WEIGHTS(0.6), markeredgecolor="black")
    cross = Line2D([], [], marker="+", linestyle="", color="black", markersize=9, markeredgewidth=2)
    point.set_label("sampling point")
    cross.set_label("reference point")
    handles = [point, cross]
    for label, color, style in lines:
        handles.append(Line2D([], [], color=color, linestyle=style, linewidth=2, label=label))
    return handles
