"""Pictures of BatchFormerV2: attention across a batch, and the detections of the two streams."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch import Tensor

from models.detector import Detections, Detector
from models.inspection import as_in_training, recording
from models.ops.reference import Shapes
from tools.explained.common import QUALITY, chosen, detector_and_pictures, output_path, save, token_at
from util.draw.batch_attention import MarkedPosition, on_padding, plot_batch_attention, plot_other_shares
from util.draw.boxes import contact_sheet, draw_boxes, side_by_side
from util.errors import UserError

PAIRS_IN_A_ROW = 2
POSITIONS = ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75))  # shown if none is chosen


def explain_batchformer(args: argparse.Namespace) -> list[Path]:
    """Attention across a batch, and the two streams' detections. Raises UserError."""
    # what can be checked before the checkpoint is loaded
    if len(args.images) < 2:
        raise UserError(
            "one image has no other to attend to; give several, as many as a batch in training has"
        )
    for x, y in args.position or ():
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"--position {x:g} {y:g} must lie in [0, 1] of the batch's width and height")

    # one run of the network, as in training
    detector, pictures = detector_and_pictures(args, args.images, batchformer=True)
    batch = [detector.prepare(picture) for picture in pictures]
    with recording(detector.model, deformable=False) as record, as_in_training(detector.model):
        mixed = detector.outputs(batch)

    # the pictures as they lie in the padded batch
    sizes = [(item.pixels.shape[1], item.pixels.shape[2]) for item in batch]
    whole = max(height for height, _ in sizes), max(width for _, width in sizes)
    sheets = [on_padding(picture, size, whole) for picture, size in zip(pictures, sizes, strict=True)]
    shapes, is_padding = record.spatial_shapes, record.padding_mask.T  # [S, N]
    padded = _maps(is_padding, shapes)

    # two pages and a line for every layer; weights [S, M, N, N]
    written = []
    for (name, after), weights in zip(_layers(detector), record.batch, strict=True):
        others = 1 - weights.mean(1).diagonal(dim1=1, dim2=2)  # [S, N]
        share, even = others[~is_padding].mean(), 1 - 1 / len(sheets)
        print(f"{after}: {share:.1%} of the attention goes to other images (even: {even:.1%})")
        title = f"Which images of a batch attend to which: {after}"
        figure = plot_batch_attention(sheets, _positions(weights, shapes, padded, args), title)
        written.append(save(figure, args, f"positions_{name}"))
        title = f"Attention to the other images, {after}"
        figure = plot_other_shares(sheets, _maps(others, shapes), padded, title)
        written.append(save(figure, args, f"others_{name}"))

    # with one stream (--bf 7) the plain one is an evaluation
    if mixed["num_streams"] == 2:
        halves = {name: mixed[name].chunk(2) for name in ("pred_logits", "pred_boxes")}
        plain = {name: half for name, (half, _) in halves.items()}
        mixed = {name: half for name, (_, half) in halves.items()}
    else:
        plain = detector.outputs(batch)
    print(_difference(plain["pred_logits"], mixed["pred_logits"], args.score_threshold))
    both = detector.detections(plain, batch), detector.detections(mixed, batch)
    return [*written, _streams(detector, pictures, both, args)]


def _layers(detector: Detector) -> Iterator[tuple[str, str]]:
    """Name and place of every layer of BatchFormerV2, in the order in which they run."""
    flags = detector.config.batchformer
    for layer in sorted(set(flags.insert_idx)):
        name, place = f"layer{layer}", f"after encoder layer {layer}"
        if flags.bt_num_layers == 1:
            yield name, place
            continue
        for depth in range(flags.bt_num_layers):
            yield f"{name}_{depth}", f"{place}, BatchFormerV2's own layer {depth}"


def _maps(tokens: Tensor, shapes: Shapes) -> list[np.ndarray]:
    """[S, N] -> per level [N, H, W]."""
    levels = tokens.split([height * width for height, width in shapes])
    return [level.T.unflatten(1, shape).numpy() for level, shape in zip(levels, shapes, strict=True)]


def _positions(
    weights: Tensor, shapes: Shapes, padded: list[np.ndarray], args: argparse.Namespace
) -> list[MarkedPosition]:
    """The tokens of --level at --position, with their attention."""
    positions = []
    levels = chosen("--level", args.level, len(shapes))
    for level, (x, y) in itertools.product(levels, args.position or POSITIONS):
        rows, columns = shapes[level]
        row, column, index = token_at(shapes, level, x, y)
        positions.append(
            MarkedPosition(
                x=(column + 0.5) / columns,
                y=(row + 0.5) / rows,
                name=f"level {level}, column {column} of {columns}, row {row} of {rows}",
                weights=weights[index].numpy(),
                padded=padded[level][:, row, column],
            )
        )
    return positions


def _difference(plain: Tensor, mixed: Tensor, threshold: float) -> str:
    """A line about logits [N, Q, C] of the two streams."""
    # a query's score is that of its best class
    plain, mixed = plain.float().sigmoid().amax(-1), mixed.float().sigmoid().amax(-1)
    found = (plain >= threshold) | (mixed >= threshold)
    if not found.any():
        none = f"no query scores {threshold:g} or more in either stream"
        best = max(plain.max().item(), mixed.max().item())
        return f"{none} (the best scores {best:.2g}; lower --score_threshold to see it)"
    apart = (plain - mixed).abs()[found]
    scoring = f"{len(apart)} queries that score at least {threshold:g} in one of the streams"
    return f"{scoring}: their scores differ by {apart.mean():.3f} on average, at most {apart.max():.3f}"


def _streams(
    detector: Detector,
    pictures: list[Image],
    both: tuple[list[Detections], list[Detections]],
    args: argparse.Namespace,
) -> Path:
    """The detections of both streams side by side."""
    # all names, so that a class has the same colour in both
    classes = list(detector.classes.names.values())
    above = f"(score >= {args.score_threshold:g})"
    titles = f"plain stream, as in evaluation {above}", f"mixed stream {above}"
    pairs = []
    for picture, *streams in zip(pictures, *both, strict=True):
        drawn = []
        for found in streams:
            shown = found.above(args.score_threshold)
            scores = shown.scores.tolist()
            drawn.append(draw_boxes(picture, shown.boxes.numpy(), shown.names, scores, classes=classes))
        pairs.append(side_by_side(drawn[0], drawn[1], titles))
    path = output_path(args, "streams")
    contact_sheet(pairs, PAIRS_IN_A_ROW).save(path, quality=QUALITY)
    return path
