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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# run as a script, Python would search this folder instead
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from models.detector import Detections, Detector, Prepared
    from models.inspection import Record, SampledAttention
    from util.draw.attention import Box, Samples
    from util.draw.batch_attention import MarkedPosition

Shapes = Sequence[tuple[int, int]]  # (height, width) of the levels

BEST = 3  # detections shown if none is chosen
PAIRS_IN_A_ROW = 2
QUALITY = 80  # of JPEG
POSITIONS = ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75))  # shown if none is chosen

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
    outcome: Box
    outcome_name: str


def explain_attention(args: argparse.Namespace) -> list[Path]:
    """Pictures of what detections, queries or a pixel look at. Raises UserError."""
    from models.inspection import recording
    from util.draw.attention import plot_samples

    # one run of the network
    detector = _detector(args)
    picture = _read(args.image)
    prepared = [detector.prepare(picture)]
    with recording(detector.model) as record:
        outputs = detector.outputs(prepared)

    # what is asked about, in which layers and heads
    if args.pixel:
        part, attentions = "encoder", record.encoder
        targets = _tokens(args, picture.size, record.spatial_shapes)
    else:
        part, attentions = "decoder", record.decoder
        found = detector.detections(outputs, prepared)[0]
        targets = _queries(args, picture.size, found, outputs["pred_boxes"][0].float().cpu())
    last = len(attentions) - 1
    num_heads = attentions[0].weights.shape[2]
    layers = _chosen("--layer", args.layer, last + 1, default=[last])
    heads = _chosen("--head", args.head, num_heads, default=range(num_heads))

    # a picture for every combination
    written = []
    for target, layer in itertools.product(targets, layers):
        title = f"{target.title} - {part} layer {layer} (of 0 to {last})"
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

    corners = (box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([*size, *size])).tolist()
    queries = found.queries.tolist()
    labels = [f"{one.name} {one.score:.2f}" for one in found]

    def target(name: str, title: str, query: int) -> Target:
        return Target(name, title, query, tuple(corners[query]), "box of the query at the end")

    # a query may give several detections: the best is named
    if args.query is not None:
        numbers = _chosen("--query", args.query, len(boxes))
        best = dict(zip(reversed(queries), reversed(labels), strict=True))
        said = [best.get(query, "not among the detections") for query in numbers]
        return [target(f"query{q}", f"query {q}: {text}", q) for q, text in zip(numbers, said, strict=True)]

    count = len(queries)
    ranks = _chosen("--detection", args.detection, count, default=range(min(BEST, count)))
    return [
        target(f"detection{i}", f"detection {i}: {labels[i]} (query {queries[i]})", queries[i]) for i in ranks
    ]


def _tokens(args: argparse.Namespace, size: tuple[int, int], shapes: Shapes) -> list[Target]:
    """The tokens of --level at --pixel."""
    (x, y), (width, height) = args.pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"--pixel {x:g} {y:g} is outside of {args.image}, which is {width} x {height}")
    targets = []
    for level in _chosen("--level", args.level, len(shapes)):
        # the cell of the picture that the token stands for
        row, column, index = _token_at(shapes, level, x / width, y / height)
        w, h = width / shapes[level][1], height / shapes[level][0]
        name, title = f"pixel{x:g}_{y:g}_level{level}", f"pixel {x:g}, {y:g} in level {level}"
        cell = (column * w, row * h, (column + 1) * w, (row + 1) * h)
        targets.append(Target(name, title, index, cell, "cell of the token"))
    return targets


def _samples(attention: SampledAttention, target: Target, size: tuple[int, int]) -> Samples:
    """Of the only image, a picture of `size` (width, height)."""
    import numpy as np

    from util.draw.attention import Samples

    # one image, and the reference point of level 0: in the image all levels have the same
    reference = attention.references_in_image()[0, target.index, 0].double().numpy()
    return Samples(
        points=attention.locations_in_image()[0, target.index].double().numpy() * size,
        weights=attention.weights[0, target.index].double().numpy(),
        reference=reference * np.tile(size, len(reference) // 2),
        outcome=target.outcome,
        outcome_name=target.outcome_name,
        shapes=attention.spatial_shapes,
    )


def _chosen(
    flag: str, numbers: Sequence[int] | None, count: int, default: Sequence[int] = ()
) -> Sequence[int]:
    """The numbers of a flag. Raises UserError for one that is not among `count` things."""
    for number in numbers or ():
        if not 0 <= number < count:
            raise UserError(f"{flag} {number} must be from 0 to {count - 1}")
    return numbers or list(default)


def _token_at(shapes: Shapes, level: int, x: float, y: float) -> tuple[int, int, int]:
    """Row, column and number of a level's token at x, y in [0, 1]."""
    # 1 belongs to the last token
    rows, columns = shapes[level]
    row, column = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
    before = sum(height * width for height, width in shapes[:level])
    return row, column, before + row * columns + column


# ---- BatchFormerV2


def explain_batchformer(args: argparse.Namespace) -> list[Path]:
    """Attention across a batch, and the two streams' detections. Raises UserError."""
    from models.inspection import as_in_training, recording
    from util.draw.batch_attention import on_padding

    if len(args.images) < 2:
        raise UserError(
            "one image has no other to attend to; give several, as many as a batch in training has"
        )
    for x, y in args.position or ():
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"--position {x:g} {y:g} must lie in [0, 1] of the batch's width and height")
    detector = _detector(args, batchformer=True)
    pictures = [_read(path) for path in args.images]
    batch = [detector.prepare(picture) for picture in pictures]
    with recording(detector.model, deformable=False) as record, as_in_training(detector.model):
        mixed = detector.outputs(batch)

    # the pictures as they lie in the padded batch
    sizes = [(item.pixels.shape[1], item.pixels.shape[2]) for item in batch]
    whole = max(height for height, _ in sizes), max(width for _, width in sizes)
    sheets = [on_padding(picture, size, whole) for picture, size in zip(pictures, sizes, strict=True)]
    written: list[Path] = []
    for (name, after), weights in zip(_layers(detector), record.batch, strict=True):
        written += _batch_pages(record, name, after, weights, sheets, args)
    return [*written, _streams(detector, pictures, batch, mixed, args)]


def _batch_pages(
    record: Record,
    name: str,
    after: str,
    weights: Tensor,
    sheets: list[Image.Image],
    args: argparse.Namespace,
) -> Iterator[Path]:
    """The two pages of a layer of BatchFormerV2, and a line about it; `weights` [S, M, N, N]."""
    from util.draw.batch_attention import plot_batch_attention, plot_other_shares

    shapes, is_padding = record.spatial_shapes, record.padding_mask.T  # [S, N]
    padded = _maps(is_padding, shapes)
    others = 1 - weights.mean(1).diagonal(dim1=1, dim2=2)  # [S, N]
    share, even = others[~is_padding].mean(), 1 - 1 / len(sheets)
    print(f"{after}: {share:.1%} of the attention goes to other images (even: {even:.1%})")

    title = f"Which images of a batch attend to which: {after}"
    figure = plot_batch_attention(sheets, _positions(weights, shapes, padded, args), title)
    yield _save(figure, args, f"positions_{name}")
    # and where in the images
    title = f"Attention to the other images, {after}"
    figure = plot_other_shares(sheets, _maps(others, shapes), padded, title)
    yield _save(figure, args, f"others_{name}")


def _layers(detector: Detector) -> Iterator[tuple[str, str]]:
    """Name and place of every layer of BatchFormerV2, in the order in which they run."""
    flags = detector.config.batchformer
    for layer in sorted(set(flags.insert_idx)):
        if flags.bt_num_layers == 1:
            yield f"layer{layer}", f"after encoder layer {layer}"
            continue
        for depth in range(flags.bt_num_layers):
            place = f"after encoder layer {layer}, BatchFormerV2's own layer {depth}"
            yield f"layer{layer}_{depth}", place


def _maps(tokens: Tensor, shapes: Shapes) -> list[np.ndarray]:
    """[S, N] -> per level [N, H, W]."""
    levels = tokens.split([height * width for height, width in shapes])
    return [level.T.unflatten(1, shape).numpy() for level, shape in zip(levels, shapes, strict=True)]


def _positions(
    weights: Tensor, shapes: Shapes, padded: list[np.ndarray], args: argparse.Namespace
) -> list[MarkedPosition]:
    """The tokens of --level at --position, with their attention."""
    from util.draw.batch_attention import MarkedPosition

    positions = []
    levels = _chosen("--level", args.level, len(shapes))
    for level, (x, y) in itertools.product(levels, args.position or POSITIONS):
        rows, columns = shapes[level]
        row, column, index = _token_at(shapes, level, x, y)
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


def _streams(
    detector: Detector,
    pictures: list[Image.Image],
    batch: list[Prepared],
    mixed: dict[str, Any],
    args: argparse.Namespace,
) -> Path:
    """Detections of both streams side by side."""
    from util.draw.boxes import contact_sheet, draw_boxes, side_by_side

    # a module of one stream has no plain one: that is an evaluation
    if mixed["num_streams"] == 2:
        halves = {name: mixed[name].chunk(2) for name in ("pred_logits", "pred_boxes")}
        plain, mixed = ({name: pair[i] for name, pair in halves.items()} for i in range(2))
    else:
        plain = detector.outputs(batch)
    threshold = args.score_threshold
    print(_difference(plain["pred_logits"], mixed["pred_logits"], threshold))

    classes = list(detector.classes.names.values())

    def draw(picture: Image.Image, found: Detections) -> Image.Image:
        shown = found.above(threshold)
        return draw_boxes(picture, shown.boxes.numpy(), shown.names, shown.scores.tolist(), classes=classes)

    # a pair for every picture
    above = f"(score >= {threshold:g})"
    titles = f"plain stream, as in evaluation {above}", f"mixed stream {above}"
    both = detector.detections(plain, batch), detector.detections(mixed, batch)
    pairs = [
        side_by_side(draw(picture, left), draw(picture, right), titles)
        for picture, left, right in zip(pictures, *both, strict=True)
    ]
    path = _path(args, "streams")
    contact_sheet(pairs, PAIRS_IN_A_ROW).save(path, quality=QUALITY)
    return path


def _difference(plain: Tensor, mixed: Tensor, threshold: float) -> str:
    """A line about logits [N, Q, C] of the two streams."""
    # a query's score is that of its best class
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
    # only now: a command that is refused leaves no folder
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args.output_dir / f"{name}.{args.format}"


# ---- flags


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tools/explain.py", __doc__, EXAMPLE)
    commands = parser.add_subparsers(required=True, metavar="{attention,batchformer}")

    title = "sampling points and weights over an image"
    command = _command(commands, "attention", explain_attention, title)
    command.add_argument("image", type=Path, help="a picture")
    _add_common(command)
    _add_attention(command)
    add_detector_flags(command)

    title = "attention across a batch, and both streams"
    command = _command(commands, "batchformer", explain_batchformer, title)
    command.add_argument("images", type=Path, nargs="+", help="the pictures of one batch, in its order")
    _add_common(command)
    _add_batchformer(command)
    add_score_threshold_flag(command, "leave out detections that score less")
    add_detector_flags(command)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], list[Path]], title: str
) -> argparse.ArgumentParser:
    description = title.capitalize() + "."
    command = commands.add_parser(name, help=title, description=description, example=EXAMPLES[name])
    command.set_defaults(command=function)
    return command


def _add_common(parser: argparse.ArgumentParser) -> None:
    add, unset = parser.add_argument, argparse.SUPPRESS
    text = "the checkpoint, published or ours: a path or an https address"
    add("--resume", required=True, default=unset, help=text)
    add("--output_dir", type=Path, required=True, default=unset, help="folder to write")
    add("--format", default="png", choices=("png", "jpg"), help="of the pictures; jpg is smaller")
    add("--device", default="", help="cuda, cpu, cuda:1, mps; default: cuda where there is one, else cpu")
    add_weights_flag(parser)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    # what is explained
    add = parser.add_mutually_exclusive_group().add_argument
    text = f"detections by rank, 0 is the best; default: the best {BEST}"
    add("--detection", type=int, nargs="+", help=text)
    add("--query", type=int, nargs="+", help="decoder queries by number, from 0")
    text = "the encoder's tokens at this pixel of the picture"
    add("--pixel", type=float, nargs=2, metavar=("X", "Y"), help=text)

    add = parser.add_argument
    text = "with --pixel: the levels whose tokens are shown; 0 is the finest"
    add("--level", type=int, nargs="+", default=[0], help=text)
    text = "decoder layers (with --pixel encoder layers), from 0; default: the last"
    add("--layer", type=int, nargs="+", help=text)
    add("--head", type=int, nargs="+", help="draw the points of these heads alone, from 0; default: all")


def _add_batchformer(parser: argparse.ArgumentParser) -> None:
    text = (
        "a position in [0, 1] of the padded batch's width and height; repeatable; "
        "default: 0.25 0.25, 0.5 0.5 and 0.75 0.75"
    )
    parser.add_argument("--position", type=float, nargs=2, action="append", metavar=("X", "Y"), help=text)
    text = "levels whose tokens at the positions are shown; 0 is the finest"
    parser.add_argument("--level", type=int, nargs="+", default=[0], help=text)


if __name__ == "__main__":
    run_as_command(main)
