"""Pictures of attention: where deformable attention samples an image, and which images of a batch
attend to which. No torch.

Shape letters: N images of a batch, M heads, L levels, P sampling points, T marked positions.
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
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from util.draw.boxes import font_file

Box = tuple[float, float, float, float]  # x0, y0, x1, y1

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 110,
}
WEIGHTS = mpl.colormaps["plasma"]
SHARES = mpl.colormaps["viridis"]
AROUND_EVEN = mpl.colormaps["PuOr"]
# Okabe and Ito's that letters can be read on; with more levels they repeat
LEVEL_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#999999")
QUERY_COLOR, REFERENCE_COLOR, REGION_COLOR = "#00E5FF", "#FFFFFF", "#FFD400"
CASING = [withStroke(linewidth=2, foreground="black")]
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


# ---- deformable attention


def plot_samples(picture: Image.Image, samples: Samples, title: str, heads: Sequence[int]) -> Figure:
    """The samples over the picture: on all of it, enlarged for every level, and each level's share
    of the weight in bars.

    Args:
        picture: RGB.
        heads: draw the samples of these alone.
    """
    levels = len(samples.shapes)
    region = _region(samples, heads, picture.size)
    columns, rows = _grid(levels + 2, picture.size)
    width, height = _panel_size(picture.size)
    scale = Normalize(0, max(float(samples.weights[heads].max()), 1e-9))
    with mpl.rc_context(STYLE):
        figure = _page((max(columns * (width + 0.25), 6.5), rows * (height + 0.55) + 1.3), title)
        cells = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for axes in cells[levels + 2 :]:
            axes.set_axis_off()
        _draw_samples(cells[0], picture, samples, heads, range(levels), scale, None, 0.3 if region else 1.0)
        cells[0].set_title("all levels\n")
        if region:
            _draw_boxes(cells[0], [(region, REGION_COLOR, (0, (1, 1.5)))])
        for level in range(levels):
            _draw_samples(cells[1 + level], picture, samples, heads, [level], scale, region)
            cells[1 + level].set_title(_level_title(samples, level, heads, picture.size, region))
        _draw_shares(cells[levels + 1], samples, heads)
        _color_bar(figure, cells, scale, WEIGHTS, "weight of a sampling point (those of a head sum to 1)")
        columns = max(1, int(figure.get_figwidth() / 1.8))  # of the legend
        figure.legend(handles=_sample_legend(samples, region), loc="outside lower left", ncols=columns)
    return figure


def _region(samples: Samples, heads: Sequence[int], size: tuple[int, int]) -> Box | None:
    """The part of the picture with the query and its points, in the picture's proportions; None if
    it is most of it.
    """
    points, weights = samples.points[heads].reshape(-1, 2), samples.weights[heads].flatten()
    counted = points[weights > 0.1 * weights.max()]
    corners = np.concatenate([counted, np.reshape(samples.outcome, (2, 2)), samples.reference[None, :2]])
    corners = np.clip(corners, 0, size)
    centre, extent = (corners.min(0) + corners.max(0)) / 2, np.ptp(corners, axis=0)
    part = max((1.15 * extent / size).max(), 0.08)
    if part > ZOOM_BELOW:
        return None
    half = part * np.array(size) / 2
    centre = np.clip(centre, half, size - half)
    return (*(centre - half).tolist(), *(centre + half).tolist())


def _grid(cells: int, size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) that leave few places empty on a page of about 4 : 3."""
    width, height = _panel_size(size)

    def badness(columns: int) -> float:
        rows = -(-cells // columns)
        return abs(math.log(columns * width / (rows * height) * 3 / 4)) + 0.4 * (rows * columns - cells)

    columns = min(range(1, cells + 1), key=badness)
    return columns, -(-cells // columns)


def _panel_size(size: tuple[int, int]) -> tuple[float, float]:
    """Width and height in inches for a picture of `size`; a panorama gets a panel that is not too
    flat for a title.
    """
    width, height = size
    return max(PANEL * min(1, width / height), 2.2), max(PANEL * min(1, height / width), 1.2)


def _draw_samples(
    axes: Axes,
    picture: Image.Image,
    samples: Samples,
    heads: Sequence[int],
    levels: Sequence[int],
    scale: Normalize,
    region: Box | None,
    shrink: float = 1.0,
) -> None:
    _show(axes, picture, region)
    boxes = [(samples.outcome, QUERY_COLOR, "-")]
    if len(samples.reference) == 4:
        x, y, w, h = samples.reference
        boxes.append(((x - w / 2, y - h / 2, x + w / 2, y + h / 2), REFERENCE_COLOR, (0, (3, 3))))
    _draw_boxes(axes, boxes)
    points = samples.points[np.ix_(heads, levels)].reshape(-1, 2)
    weights = samples.weights[np.ix_(heads, levels)].flatten()
    order = np.argsort(weights)  # the heavy ones on top
    _scatter(axes, points[order], weights[order], scale, shrink)
    for color, size, width in (("black", 11, 3.6), ("white", 9, 1.6)):
        axes.plot(*samples.reference[:2], "+", color=color, markersize=size, markeredgewidth=width, zorder=5)


def _scatter(
    axes: Axes, points: NDArray[np.float64], weights: NDArray[np.float64], scale: Normalize, shrink: float
) -> None:
    """Area and colour by weight; a white ring in a black one is seen on any ground. Point after
    point, rings too, so that one that lies on another hides it as a whole.
    """
    radii = np.sqrt(8 + 62 * weights / scale.vmax)[:, None] * shrink + np.array([2.4, 1.2, 0]) * shrink**0.5
    black, white = (np.broadcast_to(to_rgba(color), (len(points), 4)) for color in ("black", "white"))
    colors = np.stack([black, white, WEIGHTS(scale(weights))], 1)
    axes.scatter(
        *np.repeat(points, 3, 0).T, s=radii.flatten() ** 2, c=colors.reshape(-1, 4), linewidths=0, zorder=3
    )


def _draw_boxes(axes: Axes, boxes: Sequence[tuple[Box, str, object]]) -> None:
    """Boxes in colour and line style, each on black. The black goes first: of two boxes in one
    place both are seen.
    """
    for colored in (False, True):
        for (x0, y0, x1, y1), color, line in boxes:
            ink, width, style = (color, 1.6, line) if colored else ("black", 3.2, "-")
            look = {"edgecolor": ink, "linewidth": width, "linestyle": style, "fill": False, "zorder": 2}
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **look))


def _show(axes: Axes, picture: Image.Image, region: Box | None) -> None:
    """The picture, or its `region`, on axes in pixels of the whole picture, without ticks."""
    x0, y0, x1, y1 = region or (0, 0, picture.width, picture.height)
    rim = 0.025 * max(x1 - x0, y1 - y0)  # a point on the border is not cut
    left, top = max(math.floor(x0 - rim), 0), max(math.floor(y0 - rim), 0)
    right, bottom = min(math.ceil(x1 + rim), picture.width), min(math.ceil(y1 + rim), picture.height)
    part = picture.crop((left, top, right, bottom))
    # a photograph is shown in more panels than it should take memory for
    part.thumbnail((SHOWN, SHOWN))
    axes.imshow(part, extent=(left, right, bottom, top), interpolation="bicubic")
    axes.set(
        xlim=(x0 - rim, x1 + rim),
        ylim=(y1 + rim, y0 - rim),
        xticks=[],
        yticks=[],
        aspect="equal",
        anchor="NW",
    )
    axes.set_facecolor("0.9")
    axes.spines[:].set_visible(False)


def _level_title(
    samples: Samples, level: int, heads: Sequence[int], size: tuple[int, int], region: Box | None
) -> str:
    height, width = samples.shapes[level]
    share = samples.weights[heads, level].sum() / len(heads)
    points = samples.points[heads, level].reshape(-1, 2)
    x0, y0, x1, y1 = region or (0, 0, *size)
    unseen = int((~((points >= (x0, y0)) & (points <= (x1, y1))).all(1)).sum())
    hidden = f", {unseen}/{len(points)} points outside" if unseen else ""
    return f"level {level}, {width} x {height}\n{share:.0%} of the weight{hidden}"


def _draw_shares(axes: Axes, samples: Samples, heads: Sequence[int]) -> None:
    """A bar for every head, and one for their mean, divided by levels."""
    shares = samples.weights.sum(-1)  # [M, L]
    rows = [shares[heads].mean(0), *shares]
    names = ["mean", *(f"head {head}" for head in range(len(shares)))]
    places = np.arange(len(rows)) + 0.4 * (np.arange(len(rows)) > 0)
    left = np.zeros(len(rows))
    for level in range(shares.shape[1]):
        part = np.array([row[level] for row in rows])
        faded = [1.0 if row == 0 or row - 1 in heads else 0.3 for row in range(len(rows))]
        color = LEVEL_COLORS[level % len(LEVEL_COLORS)]
        axes.barh(
            places,
            part,
            left=left,
            height=0.8,
            color=[to_rgba(color, a) for a in faded],
            label=f"level {level}",
        )
        for place, start, width in zip(places, left, part, strict=True):
            if width >= 0.12:
                axes.text(start + width / 2, place, f"{width:.0%}", ha="center", va="center", fontsize=7)
        left += part
    for place, name in zip(places, names, strict=True):
        axes.text(-0.03, place, name, ha="right", va="center", fontsize=8)
    axes.set(xlim=(-0.28, 1), xticks=[], yticks=[])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_title("share of the weight\nby level")
    handles = [Patch(color=LEVEL_COLORS[i % len(LEVEL_COLORS)], label=str(i)) for i in range(shares.shape[1])]
    axes.legend(
        handles=handles,
        title="level",
        title_fontsize=8,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(0.2, -0.01),
        ncols=min(shares.shape[1], 4),
        handlelength=1,
        columnspacing=1,
        alignment="left",
        borderpad=0,
    )


def _sample_legend(samples: Samples, region: Box | None) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=WEIGHTS(0.6),
            markeredgecolor="black",
            label="sampling point",
        ),
        Line2D(
            [],
            [],
            marker="+",
            linestyle="",
            color="black",
            markersize=9,
            markeredgewidth=2,
            label="reference point",
        ),
        Line2D([], [], color=QUERY_COLOR, linewidth=2, label=samples.outcome_name),
    ]
    if len(samples.reference) == 4:
        handles.append(Line2D([], [], color="0.5", linestyle="--", linewidth=2, label="reference box"))
    if region:
        handles.append(
            Line2D([], [], color=REGION_COLOR, linestyle=":", linewidth=2, label="part shown enlarged")
        )
    return handles


# ---- attention across the images of a batch


@dataclass(frozen=True)
class Position:
    """A token position that all images of a batch share.

    x, y: in [0, 1] of the padded batch; name: for the picture; weights: [M, N, N], how much the
    image of a row attends to that of a column; padded: [N], whether the position is padding in an
    image.
    """

    x: float
    y: float
    name: str
    weights: NDArray[np.float64]
    padded: NDArray[np.bool_]


def on_padding(picture: Image.Image, own: tuple[int, int], batch: tuple[int, int]) -> Image.Image:
    """The picture as it lies in a batch: at its own (height, width) there, in the upper left corner
    of a striped sheet.
    """
    y, x = np.mgrid[: batch[0], : batch[1]]
    stripe = max(max(batch) // 40, 2)
    sheet = Image.fromarray(np.where((x + y) // stripe % 2, 222, 184).astype(np.uint8)).convert("RGB")
    sheet.paste(picture.resize((own[1], own[0]), Image.Resampling.LANCZOS))
    return sheet


def plot_batch_attention(sheets: Sequence[Image.Image], positions: Sequence[Position], title: str) -> Figure:
    """A row for every position: the mean of the heads between thumbnails of the images, then every
    head by itself.

    Args:
        sheets: N pictures of one size, `on_padding`.
        positions: T of them.
    """
    count, heads = len(sheets), len(positions[0].weights)
    side = min(0.6, 5 / (count + 1)) * (count + 1)
    small = max(0.6 * side, 1.1)
    scale = Normalize(0, max(float(position.weights.max()) for position in positions))
    with mpl.rc_context(STYLE):
        figure = _page((side + heads * (small + 0.2) + 1.6, len(positions) * (side + 0.75) + 0.9), title)
        cells = figure.subplots(
            len(positions), 1 + heads, squeeze=False, width_ratios=[side, *[small] * heads]
        )
        for row, position in zip(cells, positions, strict=True):
            _draw_matrix(row[0], position, position.weights.mean(0), scale)
            _draw_thumbnails(row[0], sheets, position)
            row[0].set_title(f"{position.name}\nmean of the heads")
            for head, axes in enumerate(row[1:]):
                _draw_matrix(axes, position, position.weights[head], scale)
                axes.set(xlim=(0, count), ylim=(count, 0), title=f"head {head}")
        bar = _color_bar(figure, cells, scale, SHARES, "attention weight (those of a row sum to 1)")
        _mark(bar, 1 / count, f"even: 1/{count}")
        label = "padding at this position, in the image of the row or of the column"
        figure.legend(handles=[_hatched(label)], loc="outside lower left")
    return figure


def plot_other_shares(
    sheets: Sequence[Image.Image],
    shares: Sequence[NDArray[np.float64]],
    padded: Sequence[NDArray[np.bool_]],
    title: str,
) -> Figure:
    """For every image (rows) and level (columns): how much of its attention a position gives to the
    other images.

    Args:
        sheets: N pictures of one size, `on_padding`.
        shares: per level [N, H, W].
        padded: per level [N, H, W], True on padding.
    """
    count = len(sheets)
    width, height = (1.9 * part / max(sheets[0].size) for part in sheets[0].size)
    even = 1 - 1 / count
    inside = [share[~mask] for share, mask in zip(shares, padded, strict=True)]
    reach = max(float(np.abs(part - even).max()) for part in inside)
    scale = Normalize(even - reach, even + reach)
    with mpl.rc_context(STYLE):
        figure = _page(
            (max((1 + len(shares)) * (width + 0.12) + 1.3, 6), count * (height + 0.08) + 1.2), title
        )
        cells = figure.subplots(count, 1 + len(shares), squeeze=False)
        for axes in cells.flat:
            axes.set(xticks=[], yticks=[], anchor="N")
        for number, (row, sheet) in enumerate(zip(cells, sheets, strict=True)):
            row[0].imshow(sheet)
            row[0].set_ylabel(number, rotation=0, ha="right", va="center")
            for axes, share, mask in zip(row[1:], shares, padded, strict=True):
                _draw_heat(axes, share[number], mask[number], sheet.size, scale)
        for level, (share, part) in enumerate(zip(shares, inside, strict=True)):
            size = f"{share.shape[2]} x {share.shape[1]}"
            cells[0, 1 + level].set_title(f"level {level}, {size}\nmean {part.mean():.0%}", fontsize=8)
        bar = _color_bar(
            figure, cells, scale, AROUND_EVEN, "share of the attention that goes to the other images"
        )
        bar.yaxis.set_major_formatter(PercentFormatter(1, 0))
        bar.set_ylim(max(scale.vmin, 0), min(scale.vmax, 1))
        _mark(bar, even, f"even: {count - 1}/{count}")
        figure.legend(handles=[_hatched("padding")], loc="outside lower left")
    return figure


def _page(size: tuple[float, float], title: str) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    # class names come in any alphabet
    font = FontProperties(fname=font_file(title), weight="bold", size=11)
    figure.suptitle(title, x=0.01, ha="left", fontproperties=font, parse_math=False)
    return figure


def _draw_matrix(axes: Axes, position: Position, weights: NDArray[np.float64], scale: Normalize) -> None:
    count = len(weights)
    axes.imshow(weights, cmap=SHARES, norm=scale, extent=(0, count, count, 0))
    axes.set(
        xticks=np.arange(count) + 0.5,
        yticks=np.arange(count) + 0.5,
        xticklabels=range(count),
        yticklabels=range(count),
    )
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    for row, column in np.ndindex(weights.shape):
        if position.padded[row] or position.padded[column]:
            axes.add_patch(
                Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0)
            )


def _draw_thumbnails(axes: Axes, sheets: Sequence[Image.Image], position: Position) -> None:
    """The images above their columns and before their rows, with the position on them, and the
    numbers in the cells.
    """
    count = len(sheets)
    width, height = (0.92 * part / max(sheets[0].size) for part in sheets[0].size)
    weights = position.weights.mean(0)
    for number, sheet in enumerate(sheets):
        for x, y in ((number + 0.5 - width / 2, -0.06 - height), (-0.06 - width, number + 0.5 - height / 2)):
            axes.imshow(sheet, extent=(x, x + width, y + height, y), interpolation="lanczos")
            place = x + position.x * width, y + position.y * height
            axes.plot(*place, "o", markersize=6, color="black", clip_on=False)
            axes.plot(*place, "o", markersize=4, color=REGION_COLOR, clip_on=False)
        for other in range(count) if count <= 8 else ():
            text = f"{weights[number, other]:.2f}"
            axes.text(
                other + 0.5,
                number + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                path_effects=CASING,
            )
    axes.set(xlim=(-0.1 - width, count), ylim=(count, -0.1 - height), xticks=[], yticks=[])
    axes.set(xlabel="image that is looked at", ylabel="image that looks")
    axes.xaxis.set_label_position("top")


def _draw_heat(
    axes: Axes, share: NDArray[np.float64], padded: NDArray[np.bool_], size: tuple[int, int], scale: Normalize
) -> None:
    """One level over the padded batch; where there is padding its own colours fade behind stripes."""
    axes.imshow(share, cmap=AROUND_EVEN, norm=scale, extent=(0, size[0], size[1], 0), interpolation="nearest")
    rows, columns = share.shape
    for row, column in np.argwhere(padded):
        x, y, w, h = column * size[0] / columns, row * size[1] / rows, size[0] / columns, size[1] / rows
        axes.add_patch(Rectangle((x, y), w, h, facecolor=(1, 1, 1, 0.55), linewidth=0))
    if padded.any():
        own = (~padded[:, 0]).sum() / rows * size[1], (~padded[0]).sum() / columns * size[0]
        for x, y, w, h in ((own[1], 0, size[0] - own[1], size[1]), (0, own[0], own[1], size[1] - own[0])):
            axes.add_patch(Rectangle((x, y), w, h, fill=False, hatch="////", edgecolor="0.5", linewidth=0))


def _hatched(label: str) -> Patch:
    return Patch(facecolor="white", edgecolor="0.5", hatch="////", label=label)


def _color_bar(figure: Figure, cells: Any, scale: Normalize, colors: Colormap, label: str) -> Axes:
    """At the right of `cells`, which keep their anchors."""
    bar = figure.colorbar(
        ScalarMappable(scale, colors), ax=cells, shrink=0.8, aspect=30, pad=0.01, panchor=False
    )
    bar.set_label(label)
    return bar.ax


def _mark(bar: Axes, value: float, label: str) -> None:
    """A line across a colour bar."""
    bar.axhline(value, color="white", linewidth=3.5)
    bar.axhline(value, color="black", linewidth=1.5)
    bar.text(0.5, 1.01, label, transform=bar.transAxes, ha="center", va="bottom", fontsize=8)
