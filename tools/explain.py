"""Show what a detector looks at.

attention: the sampling points and weights of a detection or query (decoder), or of a pixel
(encoder), over the image. Written are pictures <image>_<what>_<part><layer>.

batchformer: how BatchFormerV2 relates the images of a batch in training: which attend to which at
chosen positions (positions_layer<i>), how much every position looks at other images
(others_layer<i>), and what the plain and the mixed stream detect (streams).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run as a script, this folder would be searched instead

from util.config import (
    DataConfig,
    add_detector_flags,
    add_score_threshold_flag,
    add_weights_flag,
    detector_flags,
    make_parser,
)
from util.errors import UserError, run_as_command

if TYPE_CHECKING:  # imported where they are used: --help needs no torch
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from models.detector import Detections, Detector, Prepared
    from models.inspection import Record, SampledAttention
    from util.draw.attention import Position, Samples

BEST = 3  # detections shown if none is chosen
PAIRS_IN_A_ROW = 2
QUALITY = 80  # of JPEG

EXAMPLES = {
    "attention": """\
  python tools/explain.py attention --resume exps/run/checkpoint.pth street.jpg --output_dir out
  python tools/explain.py attention --resume exps/run/checkpoint.pth street.jpg --output_dir out \\
      --pixel 320 180 --level 0 1
""",
    "batchformer": """\
  python tools/explain.py batchformer --resume exps/run/checkpoint.pth a.jpg b.jpg c.jpg --output_dir out \\
      --position 0.5 0.5
""",
}
EXAMPLE = """\
  python tools/explain.py attention --help
  python tools/explain.py attention --resume exps/run/checkpoint.pth street.jpg --output_dir out
  python tools/explain.py batchformer --resume exps/run/checkpoint.pth a.jpg b.jpg c.jpg --output_dir out
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the flags say. Raises UserError."""
    args = _parser().parse_args(argv)
    try:
        written = args.command(args)
    except OSError as error:
        raise UserError(
            f"{error.filename or args.output_dir} can't be written ({error.strerror or error})"
        ) from None
    print(f"{', '.join(path.name for path in written)} in {args.output_dir}")


# ---- deformable attention


@dataclass(frozen=True)
class Target:
    """What is to be explained: a query of the decoder or a token of the encoder.

    name: of the file; index: among the queries or the tokens; outcome: its box, or its cell, in
    pixels of the picture.
    """

    name: str
    title: str
    index: int
    outcome: tuple[float, float, float, float]
    outcome_name: str


def explain_attention(args: argparse.Namespace) -> list[Path]:
    """Pictures of what detections, queries or a pixel look at. Raises UserError."""
    from models.inspection import recording
    from util.draw.attention import plot_samples

    detector = _detector(args)
    picture = _read(args.image)
    prepared = [detector.prepare(picture)]
    with recording(detector.model) as record:
        outputs = detector.outputs(prepared)
    if args.pixel:
        part, attentions = "encoder", record.encoder
        targets = _tokens(args, picture.size, record.spatial_shapes)
    else:
        part, attentions = "decoder", record.decoder
        targets = _queries(
            args,
            picture.size,
            detector.detections(outputs, prepared)[0],
            outputs["pred_boxes"][0].float().cpu(),
        )
    layers = _chosen("--layer", args.layer or [len(attentions) - 1], len(attentions))
    num_heads = attentions[0].weights.shape[2]
    heads = _chosen("--head", args.head or list(range(num_heads)), num_heads)
    written = []
    for target, layer in itertools.product(targets, layers):
        title = f"{target.title} - {part} layer {layer} (of 0 to {len(attentions) - 1})"
        if len(heads) < num_heads:
            title += f", head {', '.join(map(str, heads))}"
        figure = plot_samples(picture, _samples(attentions[layer], target, picture.size), title, heads)
        written.append(_save(figure, args, f"{args.image.stem}_{target.name}_{part}{layer}"))
    return written


def _queries(
    args: argparse.Namespace, size: tuple[int, int], found: Detections, boxes: Tensor
) -> list[Target]:
    """The queries of --query or --detection; `boxes` [Q, 4] cxcywh in [0, 1]."""
    from torchvision.ops import box_convert

    queries = found.queries.tolist()
    said = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True)]
    if args.query is not None:
        best = dict(zip(reversed(queries), reversed(said), strict=True))
        numbers = _chosen("--query", args.query, len(boxes))
        chosen = [(f"query{q}", f"query {q}: {best.get(q, 'not among the detections')}", q) for q in numbers]
    else:
        ranks = _chosen("--detection", args.detection or list(range(min(BEST, len(queries)))), len(queries))
        chosen = [
            (f"detection{i}", f"detection {i}: {said[i]} (query {queries[i]})", queries[i]) for i in ranks
        ]
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([*size, *size])
    return [Target(*what, tuple(corners[what[2]].tolist()), "box of the query at the end") for what in chosen]


def _tokens(
    args: argparse.Namespace, size: tuple[int, int], shapes: Sequence[tuple[int, int]]
) -> list[Target]:
    """The tokens of --level at --pixel."""
    (x, y), (width, height) = args.pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"--pixel {x:g} {y:g} is outside of {args.image}, which is {width} x {height}")
    targets = []
    for level in _chosen("--level", args.level, len(shapes)):
        rows, columns = shapes[level]
        row, column = int(y / height * rows), int(x / width * columns)
        targets.append(
            Target(
                name=f"pixel{x:g}_{y:g}_level{level}",
                title=f"pixel {x:g}, {y:g} in level {level}",
                index=_first(shapes, level) + row * columns + column,
                outcome=(
                    column * width / columns,
                    row * height / rows,
                    (column + 1) * width / columns,
                    (row + 1) * height / rows,
                ),
                outcome_name="cell of the token",
            )
        )
    return targets


def _samples(attention: SampledAttention, target: Target, size: tuple[int, int]) -> Samples:
    """Of the only image, a picture of `size` (width, height)."""
    import numpy as np

    from util.draw.attention import Samples

    reference = attention.references_in_image()[0, target.index, 0].double().numpy()
    return Samples(
        points=attention.locations_in_image()[0, target.index].double().numpy() * size,
        weights=attention.weights[0, target.index].double().numpy(),
        reference=reference * np.tile(size, len(reference) // 2),
        outcome=target.outcome,
        outcome_name=target.outcome_name,
        shapes=attention.spatial_shapes,
    )


def _chosen(flag: str, numbers: list[int], count: int) -> list[int]:
    """The numbers of a flag, if there are as many things."""
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(f"{flag} {number} must be from 0 to {count - 1}")
    return numbers


def _first(shapes: Sequence[tuple[int, int]], level: int) -> int:
    """The first token of a level."""
    return sum(height * width for height, width in shapes[:level])


# ---- BatchFormerV2


def explain_batchformer(args: argparse.Namespace) -> list[Path]:
    """Attention across a batch, and the two streams' detections. Raises UserError."""
    from models.inspection import as_in_training, recording
    from util.draw.attention import on_padding

    if len(args.images) < 2:
        raise UserError(
            "one image has no other to attend to; give several, as many as a batch in training has"
        )
    wrong = next((place for place in args.position or () if not all(0 <= x <= 1 for x in place)), None)
    if wrong is not None:
        raise UserError(
            f"--position {wrong[0]:g} {wrong[1]:g} must lie in [0, 1] of the batch's width and height"
        )
    detector = _detector(args, batchformer=True)
    pictures = [_read(path) for path in args.images]
    batch = [detector.prepare(picture) for picture in pictures]
    with recording(detector.model, deformable=False) as record, as_in_training(detector.model):
        mixed = detector.outputs(batch)
    sizes = [tuple(item.pixels.shape[1:]) for item in batch]
    whole = max(height for height, _ in sizes), max(width for _, width in sizes)
    sheets = [on_padding(picture, size, whole) for picture, size in zip(pictures, sizes, strict=True)]
    written = _batch_pages(detector, record, sheets, args)
    return [*written, _streams(detector, pictures, batch, mixed, args)]


def _batch_pages(
    detector: Detector, record: Record, sheets: list[Image.Image], args: argparse.Namespace
) -> list[Path]:
    """The pages of every layer of BatchFormerV2, and a line about each."""
    from util.draw.attention import plot_batch_attention, plot_other_shares

    flags, count = detector.config.batchformer, len(sheets)
    layers = [
        (layer, depth) for layer in sorted(set(flags.insert_idx)) for depth in range(flags.bt_num_layers)
    ]
    shapes = record.spatial_shapes
    padded = _maps(record.padding_mask.T, shapes)
    written = []
    for (layer, depth), weights in zip(layers, record.batch, strict=True):
        name = f"layer{layer}" if flags.bt_num_layers == 1 else f"layer{layer}_{depth}"
        after = f"after encoder layer {layer}" + (
            f", BatchFormerV2's own layer {depth}" if flags.bt_num_layers > 1 else ""
        )
        others = 1 - weights.mean(1).diagonal(dim1=1, dim2=2)  # [S, N]
        share = others[~record.padding_mask.T].mean()
        print(f"{after}: {share:.1%} of the attention goes to other images (even: {1 - 1 / count:.1%})")
        positions = _positions(weights, shapes, padded, args)
        title = f"Which images of a batch attend to which: {after}"
        written.append(_save(plot_batch_attention(sheets, positions, title), args, f"positions_{name}"))
        title = f"Attention to the other images, {after}"
        figure = plot_other_shares(sheets, _maps(others, shapes), padded, title)
        written.append(_save(figure, args, f"others_{name}"))
    return written


def _maps(tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> list:
    """[S, N] -> per level [N, H, W]."""
    parts = tokens.split([height * width for height, width in shapes])
    return [part.T.unflatten(1, shape).numpy() for part, shape in zip(parts, shapes, strict=True)]


def _positions(
    weights: Tensor, shapes: Sequence[tuple[int, int]], padded: list, args: argparse.Namespace
) -> list[Position]:
    """The tokens of --level at --position, with their attention."""
    from util.draw.attention import Position

    positions = []
    for level in _chosen("--level", args.level, len(shapes)):
        rows, columns = shapes[level]
        for x, y in args.position or [(0.25, 0.25), (0.5, 0.5), (0.75, 0.75)]:
            row, column = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
            positions.append(
                Position(
                    x=(column + 0.5) / columns,
                    y=(row + 0.5) / rows,
                    name=f"level {level}, column {column} of {columns}, row {row} of {rows}",
                    weights=weights[_first(shapes, level) + row * columns + column].numpy(),
                    padded=padded[level][:, row, column],
                )
            )
    return positions


def _streams(
    detector: Detector,
    pictures: list[Image.Image],
    batch: list[Prepared],
    mixed: dict,
    args: argparse.Namespace,
) -> Path:
    """Detections of both streams side by side."""
    from util.draw.boxes import contact_sheet, draw_boxes, side_by_side

    if mixed["num_streams"] == 2:
        outputs = [
            {name: mixed[name].chunk(2)[i] for name in ("pred_logits", "pred_boxes")} for i in range(2)
        ]
    else:
        outputs = [detector.outputs(batch), mixed]
    print(_difference(*(stream["pred_logits"] for stream in outputs), args.score_threshold))
    classes = list(detector.classes.names.values())
    pairs = []
    for picture, *both in zip(
        pictures, *(detector.detections(stream, batch) for stream in outputs), strict=True
    ):
        left, right = (
            draw_boxes(picture, found.boxes.numpy(), found.names, found.scores.tolist(), classes=classes)
            for found in (found.above(args.score_threshold) for found in both)
        )
        above = f"(score >= {args.score_threshold:g})"
        pairs.append(
            side_by_side(left, right, (f"plain stream, as in evaluation {above}", f"mixed stream {above}"))
        )
    path = _path(args, "streams")
    contact_sheet(pairs, PAIRS_IN_A_ROW).save(path, quality=QUALITY)
    return path


def _difference(plain: Tensor, mixed: Tensor, threshold: float) -> str:
    """A line about logits [N, Q, C] of the two streams."""
    plain, mixed = plain.float().sigmoid().amax(-1), mixed.float().sigmoid().amax(-1)
    found = (plain >= threshold) | (mixed >= threshold)
    if not found.any():
        return f"no query scores {threshold:g} or more in either stream"
    apart = (plain - mixed).abs()[found]
    scoring = f"{len(apart)} queries that score at least {threshold:g} in one of the streams"
    return f"{scoring}: their scores differ by {apart.mean():.3f} on average, at most {apart.max():.3f}"


# ---- files


def _detector(args: argparse.Namespace, batchformer: bool = False) -> Detector:
    from models import load_detector

    return load_detector(
        args.resume, device=args.device, weights=args.weights, batchformer=batchformer, **detector_flags(args)
    )


def _read(path: Path) -> Image.Image:
    from util.images.prepare import read_picture

    return read_picture(path, DataConfig.max_image_megapixels, "or leave it out")


def _save(figure: Figure, args: argparse.Namespace, name: str) -> Path:
    path = _path(args, name)
    figure.savefig(path, pil_kwargs={"quality": QUALITY} if args.format == "jpg" else {})
    return path


def _path(args: argparse.Namespace, name: str) -> Path:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args.output_dir / f"{name}.{args.format}"


# ---- flags


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/explain.py", __doc__, EXAMPLE)
    commands = parser.add_subparsers(required=True, metavar="{attention,batchformer}")
    _add_attention(
        _command(commands, "attention", explain_attention, "sampling points and weights over an image")
    )
    _add_batchformer(
        _command(commands, "batchformer", explain_batchformer, "attention across a batch, and both streams")
    )
    return parser


def _command(commands, name: str, function, title: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=title, description=title.capitalize() + ".", example=EXAMPLES[name]
    )
    command.set_defaults(command=function)
    return command


def _add_common(parser: argparse.ArgumentParser) -> None:
    add, unset = parser.add_argument, argparse.SUPPRESS
    add(
        "--resume",
        required=True,
        default=unset,
        help="the checkpoint, published or ours: a path or an https address",
    )
    add("--output_dir", type=Path, required=True, default=unset, help="folder to write")
    add("--format", default="png", choices=("png", "jpg"), help="of the pictures; jpg is smaller")
    add("--device", default="", help="cuda, cpu, cuda:1, mps; default: cuda where there is one, else cpu")
    add_weights_flag(parser)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="a picture")
    _add_common(parser)
    choice = parser.add_mutually_exclusive_group()
    add = choice.add_argument
    add(
        "--detection",
        type=int,
        nargs="+",
        help=f"detections by rank, 0 is the best; default: the best {BEST}",
    )
    add("--query", type=int, nargs="+", help="decoder queries by number, from 0")
    add(
        "--pixel",
        type=float,
        nargs=2,
        metavar=("X", "Y"),
        help="the encoder's tokens at this pixel of the picture",
    )
    add = parser.add_argument
    add(
        "--level",
        type=int,
        nargs="+",
        default=[0],
        help="with --pixel: the levels whose tokens are shown; 0 is the finest",
    )
    add(
        "--layer",
        type=int,
        nargs="+",
        help="decoder layers (with --pixel encoder layers), from 0; default: the last",
    )
    add("--head", type=int, nargs="+", help="draw the points of these heads alone, from 0; default: all")
    add_detector_flags(parser)


def _add_batchformer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", help="the pictures of one batch, in its order")
    _add_common(parser)
    add = parser.add_argument
    add(
        "--position",
        type=float,
        nargs=2,
        action="append",
        metavar=("X", "Y"),
        help="a position in [0, 1] of the padded batch's width and height; repeatable; "
        "default: 0.25 0.25, 0.5 0.5 and 0.75 0.75",
    )
    add(
        "--level",
        type=int,
        nargs="+",
        default=[0],
        help="levels whose tokens at the positions are shown; 0 is the finest",
    )
    add_score_threshold_flag(parser, "leave out detections that score less")
    add_detector_flags(parser)


if __name__ == "__main__":
    run_as_command(main)
