"""Pictures of deformable attention: what detections, queries or a pixel look at."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.ops import box_convert

from models.detector import Detections
from models.inspection import SampledAttention, recording
from models.ops.reference import Shapes
from tools.explained.common import chosen, detector_and_pictures, save, token_at
from util.draw.attention import Box, Samples, plot_samples
from util.errors import UserError

BEST = 3  # detections shown if none is chosen


@dataclass(frozen=True)
class Target:
    """What is to be explained: a query of the decoder or a token of the encoder.

    name: of the file; index: among the queries or the tokens; outcome: the query's box at the end, or
    the token's cell, in pixels of the picture.
    """

    name: str
    title: str
    index: int
    outcome: Box


def explain_attention(args: argparse.Namespace) -> list[Path]:
    """Pictures of what detections, queries or a pixel look at. Raises UserError."""
    # one run of the network
    detector, (picture,) = detector_and_pictures(args, [args.image])
    prepared = [detector.prepare(picture)]
    with recording(detector.model) as record:
        outputs = detector.outputs(prepared)

    # what is asked about, in which layers and heads
    if args.pixel:
        part, attentions, outcome_name = "encoder", record.encoder, "cell of the token"
        targets = _tokens(args, picture.size, record.spatial_shapes)
    else:
        part, attentions, outcome_name = "decoder", record.decoder, "box of the query at the end"
        found = detector.detections(outputs, prepared)[0]
        targets = _queries(args, picture.size, found, outputs["pred_boxes"][0].float().cpu())
    last = len(attentions) - 1
    num_heads = attentions[0].weights.shape[2]
    layers = chosen("--layer", args.layer, last + 1, default=[last])
    heads = chosen("--head", args.head, num_heads, default=range(num_heads))

    # a picture for every combination
    written = []
    for target, layer in itertools.product(targets, layers):
        title = f"{target.title} - {part} layer {layer} (of 0 to {last})"
        if len(heads) < num_heads:
            title += f", head {', '.join(map(str, heads))}"
        samples = _samples(attentions[layer], target, outcome_name, picture.size)
        figure = plot_samples(picture, samples, title, heads)
        written.append(save(figure, args, f"{args.image.stem}_{target.name}_{part}{layer}"))
    return written


def _queries(
    args: argparse.Namespace, size: tuple[int, int], found: Detections, boxes: Tensor
) -> list[Target]:
    """The queries of --query or --detection; `boxes` [Q, 4] cxcywh in [0, 1]."""
    corners = (box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor(size * 2)).tolist()
    queries = found.queries.tolist()
    labels = [f"{one.name} {one.score:.2f}" for one in found]

    # a detection is named by its rank
    targets = []
    if args.query is None:
        count = len(queries)
        for i in chosen("--detection", args.detection, count, default=range(min(BEST, count))):
            title = f"detection {i}: {labels[i]} (query {queries[i]})"
            targets.append(Target(f"detection{i}", title, queries[i], tuple(corners[queries[i]])))
        return targets

    # a query may give several detections: its title names the best, which come first
    best = dict(zip(reversed(queries), reversed(labels), strict=True))
    for query in chosen("--query", args.query, len(boxes)):
        title = f"query {query}: {best.get(query, 'not among the detections')}"
        targets.append(Target(f"query{query}", title, query, tuple(corners[query])))
    return targets


def _tokens(args: argparse.Namespace, size: tuple[int, int], shapes: Shapes) -> list[Target]:
    """The tokens of --level at --pixel."""
    (x, y), (width, height) = args.pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"--pixel {x:g} {y:g} is outside of {args.image}, which is {width} x {height}")
    targets = []
    for level in chosen("--level", args.level, len(shapes)):
        # the cell of the picture that the token stands for
        row, column, index = token_at(shapes, level, x / width, y / height)
        w, h = width / shapes[level][1], height / shapes[level][0]
        cell = (column * w, row * h, (column + 1) * w, (row + 1) * h)
        title = f"pixel {x:g}, {y:g} in level {level}"
        targets.append(Target(f"pixel{x:g}_{y:g}_level{level}", title, index, cell))
    return targets


def _samples(
    attention: SampledAttention, target: Target, outcome_name: str, size: tuple[int, int]
) -> Samples:
    """Of the only image, a picture of `size` (width, height)."""
    # the reference point of level 0: in the image all levels have the same
    reference = attention.references_in_image()[0, target.index, 0].double().numpy()
    return Samples(
        points=attention.locations_in_image()[0, target.index].double().numpy() * size,
        weights=attention.weights[0, target.index].double().numpy(),
        reference=reference * np.tile(size, len(reference) // 2),
        outcome=target.outcome,
        outcome_name=outcome_name,
        shapes=attention.spatial_shapes,
    )
