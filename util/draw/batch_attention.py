"""Pictures of BatchFormerV2: which images of a batch attend to which. No torch.

Shape letters: N images of a batch, M heads, T marked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from util.draw.attention import REGION_COLOR, STYLE, color_bar, page

SHARES = mpl.colormaps["viridis"]
AROUND_EVEN = mpl.colormaps["PuOr"]
CASING = [withStroke(linewidth=2, foreground="black")]
MOST_NUMBERS = 8  # images; in the cells of more there is no room for numbers


@dataclass(frozen=True)
class MarkedPosition:
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
    """The picture as it lies in a batch: in the upper left corner of a striped sheet.

    `own` and `batch` are (height, width) of the picture there and of the padded batch.
    """
    # stripes say padding, not a part of a photograph
    y, x = np.mgrid[: batch[0], : batch[1]]
    stripe = max(max(batch) // 40, 2)
    sheet = Image.fromarray(np.where((x + y) // stripe % 2, 222, 184).astype(np.uint8)).convert("RGB")
    sheet.paste(picture.resize((own[1], own[0]), Image.Resampling.LANCZOS))
    return sheet


def plot_batch_attention(
    sheets: Sequence[Image.Image], positions: Sequence[MarkedPosition], title: str
) -> Figure:
    """A row for every position: the mean of the heads between thumbnails, then every head.

    Args:
        sheets: N pictures of one size, from `on_padding`.
        positions: T of them.
    """
    # a cell has 0.6 inches, less for large batches
    count, heads = len(sheets), len(positions[0].weights)
    side = min(0.6, 5 / (count + 1)) * (count + 1)  # inches of the mean
    small = max(0.6 * side, 1.1)  # and of a head
    scale = Normalize(0, max(float(position.weights.max()) for position in positions))

    with mpl.rc_context(STYLE):
        figure = page((side + heads * (small + 0.2) + 1.6, len(positions) * (side + 0.75) + 0.9), title)
        widths = [side, *[small] * heads]
        cells = figure.subplots(len(positions), 1 + heads, squeeze=False, width_ratios=widths)
        for row, position in zip(cells, positions, strict=True):
            _draw_matrix(row[0], position, position.weights.mean(0), scale)
            _draw_thumbnails(row[0], sheets, position)
            row[0].set_title(f"{position.name}\nmean of the heads")
            for head, axes in enumerate(row[1:]):
                _draw_matrix(axes, position, position.weights[head], scale)
                axes.set(xlim=(0, count), ylim=(count, 0), title=f"head {head}")

        bar = color_bar(figure, cells, scale, SHARES, "attention weight (those of a row sum to 1)")
        _mark(bar, 1 / count, f"even: 1/{count}")
        _legend(figure, "padding at this position, in the image of the row or of the column")
    return figure


def plot_other_shares(
    sheets: Sequence[Image.Image],
    shares: Sequence[NDArray[np.float64]],
    padded: Sequence[NDArray[np.bool_]],
    title: str,
) -> Figure:
    """For every image (rows) and level (columns) the attention that positions give to other images.

    Args:
        sheets: N pictures of one size, from `on_padding`.
        shares: per level [N, H, W].
        padded: per level [N, H, W], True on padding.
    """
    count = len(sheets)
    even = 1 - 1 / count
    inside = [share[~mask] for share, mask in zip(shares, padded, strict=True)]
    # white is the even share, and both colours reach equally far
    reach = max(float(np.abs(part - even).max()) for part in inside)
    scale = Normalize(even - reach, even + reach)

    width, height = (1.9 * part / max(sheets[0].size) for part in sheets[0].size)  # inches
    size = max((1 + len(shares)) * (width + 0.12) + 1.3, 6), count * (height + 0.08) + 1.2
    with mpl.rc_context(STYLE):
        figure = page(size, title)
        cells = figure.subplots(count, 1 + len(shares), squeeze=False)
        for axes in cells.flat:
            axes.set(xticks=[], yticks=[], anchor="N")
        for number, (row, sheet) in enumerate(zip(cells, sheets, strict=True)):
            row[0].imshow(sheet)
            row[0].set_ylabel(number, rotation=0, ha="right", va="center")
            for axes, share, mask in zip(row[1:], shares, padded, strict=True):
                _draw_heat(axes, share[number], mask[number], sheet.size, scale)
        # the mean is that of the positions without padding
        for level, (share, part) in enumerate(zip(shares, inside, strict=True)):
            text = f"level {level}, {share.shape[2]} x {share.shape[1]}\nmean {part.mean():.0%}"
            cells[0, 1 + level].set_title(text, fontsize=8)

        label = "share of the attention that goes to the other images"
        bar = color_bar(figure, cells, scale, AROUND_EVEN, label)
        bar.yaxis.set_major_formatter(PercentFormatter(1, 0))
        bar.set_ylim(max(even - reach, 0), min(even + reach, 1))
        _mark(bar, even, f"even: {count - 1}/{count}")
        _legend(figure, "padding")
    return figure


def _draw_matrix(
    axes: Axes, position: MarkedPosition, weights: NDArray[np.float64], scale: Normalize
) -> None:
    count = len(weights)
    axes.imshow(weights, cmap=SHARES, norm=scale, extent=(0, count, count, 0))
    middles = np.arange(count) + 0.5
    axes.set(xticks=middles, yticks=middles, xticklabels=range(count), yticklabels=range(count))
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")

    # attention of padding, and to padding
    for row, column in np.ndindex(weights.shape):
        if position.padded[row] or position.padded[column]:
            _hatch(axes, column, row, 1, 1, "0.75")


def _draw_thumbnails(axes: Axes, sheets: Sequence[Image.Image], position: MarkedPosition) -> None:
    """The images above their columns and before their rows, and the numbers in the cells."""
    count = len(sheets)
    width, height = (0.92 * part / max(sheets[0].size) for part in sheets[0].size)
    for number, sheet in enumerate(sheets):
        middle = number + 0.5
        for x, y in ((middle - width / 2, -0.06 - height), (-0.06 - width, middle - height / 2)):
            axes.imshow(sheet, extent=(x, x + width, y + height, y), interpolation="lanczos")
            # the position on the image
            place = x + position.x * width, y + position.y * height
            axes.plot(*place, "o", markersize=6, color="black", clip_on=False)
            axes.plot(*place, "o", markersize=4, color=REGION_COLOR, clip_on=False)

    weights = position.weights.mean(0)
    if count <= MOST_NUMBERS:
        for (row, column), weight in np.ndenumerate(weights):
            text = axes.text(column + 0.5, row + 0.5, f"{weight:.2f}", ha="center", va="center")
            text.set(fontsize=7, color="white", path_effects=CASING)
    axes.set(xlim=(-0.1 - width, count), ylim=(count, -0.1 - height), xticks=[], yticks=[])
    axes.set(xlabel="image that is looked at", ylabel="image that looks")
    axes.xaxis.set_label_position("top")


def _draw_heat(
    axes: Axes, share: NDArray[np.float64], padded: NDArray[np.bool_], size: tuple[int, int], scale: Normalize
) -> None:
    """One level over the padded batch. The colours of padding fade behind stripes."""
    width, height = size
    axes.imshow(share, cmap=AROUND_EVEN, norm=scale, extent=(0, width, height, 0), interpolation="nearest")
    if not padded.any():
        return
    rows, columns = share.shape
    w, h = width / columns, height / rows  # of a cell
    for row, column in np.argwhere(padded):
        axes.add_patch(Rectangle((column * w, row * h), w, h, facecolor=(1, 1, 1, 0.55), linewidth=0))

    # padding lies right and below of the image's own part
    own_height, own_width = (~padded[:, 0]).sum() * h, (~padded[0]).sum() * w
    _hatch(axes, own_width, 0, width - own_width, height, "0.5")
    _hatch(axes, 0, own_height, own_width, height - own_height, "0.5")


def _hatch(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fill=False, hatch="////", edgecolor=color, linewidth=0))


def _legend(figure: Figure, label: str) -> None:
    hatched = Patch(facecolor="white", edgecolor="0.5", hatch="////", label=label)
    figure.legend(handles=[hatched], loc="outside lower left")


def _mark(bar: Axes, value: float, label: str) -> None:
    """A line across a colour bar."""
    bar.axhline(value, color="white", linewidth=3.5)
    bar.axhline(value, color="black", linewidth=1.5)
    bar.text(0.5, 1.01, label, transform=bar.transAxes, ha="center", va="bottom", fontsize=8)
