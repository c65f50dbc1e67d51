"""Every flag of main.py: its name, its default, its meaning and what it may be combined with.

A frozen dataclass per concern; argparse is derived from the fields. No torch here, so `--help` is
immediate.

    config = parse_config(["--bf", "1", "--insert_idx", "0"])
    config.batchformer.insert_idx      # (0,)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.backbones import BACKBONES
from util.class_map import AUTO, ClassMap
from util.errors import UserError

PUBLISHED_TRAIN_SIZES = tuple(range(480, 801, 32))
LEARNED_POSITIONS = 50
WEIGHTS = ("auto", "model", "ema")  # of a checkpoint


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    repeat: bool = False,
    parse: Callable | None = None,
) -> Any:
    """A dataclass field that is a command-line flag. `repeat`: `--x 1 --x 2` besides `--x 1 2`.
    `parse`: makes a value of the text; the field's type does without it.
    """
    return field(
        default=default, metadata={"help": help, "choices": choices, "repeat": repeat, "parse": parse}
    )


def number_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


number_or_auto.__name__ = "number"  # argparse's messages say so


@dataclass(frozen=True)
class OptimConfig:
    """optimiser"""

    lr: float = flag(2e-4, "learning rate of the transformer and the heads")
    lr_backbone_names: tuple[str, ...] = flag(
        ("backbone.0",), "parameters whose name contains one of these take lr_backbone"
    )
    lr_backbone: float = flag(2e-5, "learning rate of the backbone; 0 freezes it")
    lr_linear_proj_names: tuple[str, ...] = flag(
        ("reference_points", "sampling_offsets"),
        "parameters whose name contains one of these take lr x lr_linear_proj_mult",
    )
    lr_linear_proj_mult: float = flag(0.1, "factor on lr for lr_linear_proj_names")
    batch_size: int = flag(2, "images per process and step; BatchFormerV2 relates these images to each other")
    accumulate_steps: int = flag(
        1,
        "batches whose gradients are averaged before an optimiser step; does not enlarge "
        "BatchFormerV2's batch",
    )
    weight_decay: float = flag(1e-4, "weight decay of AdamW or SGD")
    epochs: int = flag(50, "train up to this epoch")
    lr_drop: int = flag(40, "divide the learning rates by 10 every so many epochs")
    lr_drop_epochs: tuple[int, ...] = flag((), "divide them after these epochs instead")
    clip_max_norm: float = flag(0.1, "clip the gradient's norm to this; 0 does not clip")
    sgd: bool = flag(False, "SGD with momentum 0.9 instead of AdamW")
    ema_decay: float = flag(
        0.0, "keep an exponential moving average of the weights, with this decay (0.9998, say); 0: none"
    )


@dataclass(frozen=True)
class BackboneConfig:
    """backbone"""

    backbone: str = flag("resnet50", "a ResNet of torchvision", choices=tuple(BACKBONES))
    backbone_weights: str = flag(
        "imagenet", "imagenet (ImageNet V1 of torchvision), none (random), or a state-dict file"
    )
    backbone_norm: str = flag(
        "frozen_bn",
        "frozen_bn (as published, needs trained weights), bn or gn (for a network that starts "
        "from random weights)",
        choices=("frozen_bn", "bn", "gn"),
    )
    dilation: bool = flag(False, "DC5: dilation instead of the last stride")
    position_embedding: str = flag("sine", "position encoding", choices=("sine", "learned"))
    position_embedding_scale: float = flag(2 * math.pi, "scale of the sine position encoding")
    num_feature_levels: int = flag(
        4, "1 (the last map of the backbone) or 3 and more (strides 8, 16, 32, then halved)"
    )


@dataclass(frozen=True)
class TransformerConfig:
    """transformer"""

    enc_layers: int = flag(6, "encoder layers")
    dec_layers: int = flag(6, "decoder layers")
    dim_feedforward: int = flag(1024, "width of the feed-forward blocks")
    hidden_dim: int = flag(256, "width of the tokens")
    dropout: float = flag(0.1, "dropout of the transformer")
    drop_path: float = flag(
        0.0,
        "stochastic depth of the encoder's and decoder's residual branches: 0 in the first layer, "
        "this in the last",
    )
    nheads: int = flag(8, "attention heads")
    num_queries: int = flag(300, "object queries")
    dec_n_points: int = flag(4, "sampling points per head and level in the decoder")
    enc_n_points: int = flag(4, "sampling points per head and level in the encoder")
    with_box_refine: bool = flag(False, "iterative bounding box refinement")
    two_stage: bool = flag(False, "queries from the encoder's proposals; needs with_box_refine")
    checkpoint_encoder: bool = flag(
        False,
        "compute the encoder's activations again in the backward instead of keeping them: less "
        "memory, same gradients",
    )


@dataclass(frozen=True)
class SegmentationConfig:
    """segmentation (not available yet)"""

    masks: bool = flag(False, "train segmentation")
    frozen_weights: str = flag("", "a trained detector under a segmentation head")


@dataclass(frozen=True)
class LossConfig:
    """matching and losses"""

    no_aux_loss: bool = flag(False, "no losses at the intermediate decoder layers")
    set_cost_class: float = flag(2.0, "class cost in the matching")
    set_cost_bbox: float = flag(5.0, "L1 box cost in the matching")
    set_cost_giou: float = flag(2.0, "generalised IoU cost in the matching")
    mask_loss_coef: float = flag(1.0, "weight of the mask's focal loss (segmentation)")
    dice_loss_coef: float = flag(1.0, "weight of the mask's dice loss (segmentation)")
    cls_loss_coef: float = flag(2.0, "weight of the class loss")
    bbox_loss_coef: float = flag(5.0, "weight of the L1 box loss")
    giou_loss_coef: float = flag(2.0, "weight of the generalised IoU loss")
    focal_alpha: float = flag(0.25, "alpha of the focal loss")


@dataclass(frozen=True)
class DataConfig:
    """data"""

    dataset_file: str = flag("coco", "kind of data set: coco")
    coco_path: str = flag(
        "./data/coco", "folder with train2017, val2017 and annotations/instances_{train,val}2017.json"
    )
    train_images: str = flag("", "folder of the images to train on, instead of train2017 in coco_path")
    train_annotations: str = flag("", "their annotations: a COCO instances file")
    val_images: str = flag("", "folder of the images to evaluate on, instead of val2017 in coco_path")
    val_annotations: str = flag("", "their annotations")
    coco_panoptic_path: str = flag("", "folder of COCO panoptic (segmentation)")
    remove_difficult: bool = flag(False, "not used by COCO data")
    num_classes: int | str = flag(
        AUTO,
        "class logits. auto: as many as the annotations have categories, whatever their ids; 91 "
        "for COCO's own categories, as published. A number: category ids are labels, in [0, "
        "num_classes)",
        parse=number_or_auto,
    )
    cache_mode: bool = flag(False, "keep the image files in memory; every process keeps all of them")
    num_workers: int = flag(2, "loader processes per training process; 0 loads in the training process")
    train_sizes: tuple[int, ...] = flag(PUBLISHED_TRAIN_SIZES, "shorter sides to train with, in pixels")
    eval_size: int = flag(800, "shorter side in evaluation, in pixels")
    max_size: int = flag(1333, "limit of the longer side, in pixels")
    crop_resize_sizes: tuple[int, ...] = flag(
        (400, 500, 600), "shorter sides before a random crop, in pixels"
    )
    crop_sizes: tuple[int, ...] = flag((384, 600), "smallest and largest side of the random crop, in pixels")
    augmentation: str = flag(
        "published",
        "published (flip, scale, crop), flip (flip and scale) or none (scale only)",
        choices=("published", "flip", "none"),
    )
    on_bad_image: str = flag(
        "stop",
        "stop, or skip an image that can't be read: training takes the next one in its place",
        choices=("stop", "skip"),
    )
    max_bad_images: int = flag(
        100, "with --on_bad_image skip: end the run when a process has met more than so many bad files"
    )
    max_image_megapixels: float = flag(100.0, "refuse larger images before they are decoded")

    def images_folder(self, image_set: str) -> Path:
        """Where the images of "train" or "val" are."""
        given = {"train": self.train_images, "val": self.val_images}[image_set]
        return Path(given) if given else Path(self.coco_path) / f"{image_set}2017"

    def annotations_file(self, image_set: str) -> Path:
        """The COCO instances file of "train" or "val"."""
        given = {"train": self.train_annotations, "val": self.val_annotations}[image_set]
        return (
            Path(given) if given else Path(self.coco_path) / "annotations" / f"instances_{image_set}2017.json"
        )


@dataclass(frozen=True)
class RunConfig:
    """run"""

    output_dir: str = flag("", "where checkpoints and logs go; nothing is saved without it")
    device: str = flag("", "cuda, cpu, cuda:1, mps; default: cuda where there is one, else cpu")
    seed: int = flag(42, "seed of weights, data order and augmentation")
    resume: str = flag(
        "",
        "a checkpoint to go on from or to evaluate, whose architecture is taken: a path, an https "
        "address, or auto: the newest good one in output_dir",
    )
    finetune: str = flag(
        "",
        "start from the weights of this checkpoint (ours, published, or Hugging Face's), whose "
        "architecture is taken; a path or an https address",
    )
    start_epoch: int = flag(0, "first epoch, for a checkpoint that does not say")
    eval: bool = flag(
        False, "evaluate only; image sizes too are those of the checkpoint where they are not given"
    )
    eval_every: int = flag(1, "evaluate after every so many epochs, and after the last")
    coco_eval: str = flag(
        "faster",
        "what computes COCO's figures: faster (faster-coco-eval) or pycocotools; results are equal",
        choices=("faster", "pycocotools"),
    )
    save_every: int = flag(0, "save every so many iterations too; 0: after every epoch and on a signal only")
    keep: int = flag(2, "how many of the last checkpoints are kept, beside those of the published schedule")
    amp: str = flag(
        "off", "mixed precision: bf16, or fp16 with a gradient scaler", choices=("off", "bf16", "fp16")
    )
    deterministic: bool = flag(
        False, "the same bits in every run on the same machine, or an error that names what can't"
    )
    on_nan: str = flag(
        "stop",
        "stop, or skip a step whose loss or gradient is not finite (its batch is saved)",
        choices=("stop", "skip"),
    )
    max_nan_steps: int = flag(10, "with --on_nan skip: end the run after more than so many such steps")
    dist_timeout: int = flag(
        1800, "seconds that a process waits for the others, or for its loader, before the run ends"
    )
    save_predictions: bool = flag(
        False, "write the detections to predictions.json in output_dir (COCO results format)"
    )
    tensorboard: bool = flag(
        False, "write losses, rates, figures and pictures for TensorBoard to <output_dir>/tensorboard"
    )
    log_every: int = flag(10, "steps between log lines; only then are the losses read back from the device")

    @property
    def starts_from_weights(self) -> bool:
        """Whether a checkpoint is named, which brings the backbone's weights along."""
        return bool(self.finetune) or self.resume not in ("", "auto")


@dataclass(frozen=True)
class BatchFormerConfig:
    """BatchFormerV2"""

    bf: int = flag(0, "0 off, 1 two streams, 7 one stream", choices=(0, 1, 7))
    share_bf: int = flag(1, "1: one module for all insertions; 0: one of its own for each", choices=(0, 1))
    bt_num_layers: int = flag(1, "transformer layers in a module")
    insert_idx: tuple[int, ...] = flag(
        (), "encoder layer after which the module is inserted; repeatable", repeat=True
    )
    eval_bf: bool = flag(False, "run the module in evaluation too, across the images of the evaluation batch")


@dataclass(frozen=True)
class Config:
    """All flags, by concern. Valid by construction: a combination that can't work raises UserError.

    classes: the data's or a checkpoint's, where they are known; --num_classes is their number then.
    given: the flags that were given on a command line; None: all of them. settled: False until a
    checkpoint has said what the others are (models/weights/architecture.py); only then is it known whether
    they
        go together.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    batchformer: BatchFormerConfig = field(default_factory=BatchFormerConfig)
    classes: ClassMap | None = None
    given: frozenset[str] | None = None
    settled: bool = True

    def __post_init__(self) -> None:
        of_each = (_check_numbers, _check_unavailable, _check_run)
        of_all = (_check_architecture, _check_batchformer, _check_data) if self.settled else ()
        for check in (*of_each, *of_all):
            check(self)

    def is_given(self, name: str) -> bool:
        return self.given is None or name in self.given

    def flags(self) -> dict[str, Any]:
        """Flag name -> value, as plain data (lists for tuples), for logs and checkpoints."""
        values = {f.name: getattr(getattr(self, g.name), f.name) for g, f in all_flags()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def with_flags(self, flags: Mapping[str, Any], **fields: Any) -> Config:
        """The Config with other values for some flags, and for `fields` of its own; names that are
        no flags are passed over.

        Raises UserError for values that no Config can have.
        """
        groups = {}
        for group in _groups():
            names = {f.name for f in dataclasses.fields(_config_class(group))} & flags.keys()
            groups[group.name] = dataclasses.replace(
                getattr(self, group.name), **{name: _frozen(flags[name]) for name in names}
            )
        try:
            return dataclasses.replace(self, **groups, **fields)
        except TypeError as error:
            raise UserError(f"these flags of a checkpoint can't be used: {error}") from None

    def without_effect(self) -> list[str]:
        """Flags of BatchFormerV2 that were given though it is off."""
        names = [f.name for f in dataclasses.fields(BatchFormerConfig) if f.name != "bf"]
        return (
            []
            if self.batchformer.bf or self.given is None
            else [name for name in names if name in self.given]
        )


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Flags (default: the command line's) to a Config. Raises UserError for what argparse or a
    check refuses.
    """
    parser = make_parser("main.py", _DESCRIPTION, _EXAMPLE)
    parser.usage = "python main.py [flags]"
    return parse_with_config(parser, argv)[1]


def parse_with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **defaults: Any
) -> tuple[argparse.Namespace, Config]:
    """For programs with flags of their own beside main's: the namespace, and the Config of main's
    flags in it.

    `defaults` are the program's own for some of main's flags. With --resume or --finetune the
    Config is not settled yet.
    """
    add_config_flags(parser).set_defaults(**defaults)
    names = [item.name for _, item in all_flags()]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN)))
    given = frozenset(name for name in names if getattr(args, name) is not _NOT_GIVEN)
    for name in set(names) - given:
        setattr(args, name, parser.get_default(name))
    settled = not (args.resume or args.finetune)
    return args, Config().with_flags(vars(args), given=given, settled=settled)


def make_parser(prog: str, description: str, example: str = "") -> argparse.ArgumentParser:
    """A parser that raises UserError instead of ending the process, and shows defaults and the
    `example` in its help.
    """
    return _Parser(f"python {prog}", description, example)


def add_score_threshold_flag(parser: argparse.ArgumentParser, help: str) -> None:
    """--score_threshold, from 0 to 1: the same in every tool that shows detections."""
    parser.add_argument("--score_threshold", type=_score, default=0.3, help=help)


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    """--weights: which of a checkpoint's weights are taken (models/weights/load.py)."""
    parser.add_argument(
        "--weights",
        default="auto",
        choices=WEIGHTS,
        help="ema: the averaged weights of --ema_decay; model: the others; auto: the "
        "averaged where the checkpoint has "
        "them, unless its last evaluation found them worse",
    )


def add_config_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every field of Config to `parser`, spelt with underscores and with dashes."""
    for group in _groups():
        section = parser.add_argument_group(_config_class(group).__doc__)
        for item in dataclasses.fields(_config_class(group)):
            _add_flag(section, item, _types(group)[item.name])
    parser.add_argument("--local_rank", "--local-rank", type=_local_rank, help=argparse.SUPPRESS)
    return parser


def _local_rank(text: str) -> None:
    """torch.distributed.launch says in a flag, too, what torchrun says in variables alone."""
    if os.environ.get("LOCAL_RANK") != text:
        raise argparse.ArgumentTypeError(
            f"{text} is from a launcher that does not set LOCAL_RANK; start with torchrun"
        )


# what the weights of a detector don't tell (models/weights/architecture.py)
_UNTOLD = ("eval_size", "max_size", "dilation", "nheads", "num_queries", "position_embedding_scale")


def add_untold_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of Config that the weights of a checkpoint don't tell, for programs that need
    nothing else of it.
    """
    group = parser.add_argument_group(
        "flags of main.py that a checkpoint may lack", "default: what it says, else main.py's own"
    )
    for config in (DataConfig, BackboneConfig, TransformerConfig):
        for item in dataclasses.fields(config):
            if item.name in _UNTOLD:
                kind = {"action": "store_true"} if item.default is False else {"type": type(item.default)}
                group.add_argument(
                    f"--{item.name}", default=argparse.SUPPRESS, help=item.metadata["help"], **kind
                )


def untold_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_untold_flags` that were given."""
    return {name: getattr(args, name) for name in _UNTOLD if name in args}


_DESCRIPTION = "Train and evaluate Deformable DETR with BatchFormerV2 on COCO-format data."
_EXAMPLE = """\
  python main.py --coco_path data/coco --output_dir exps/batchformer \\
      --batch_size 3 --bf 1 --share_bf 0 --insert_idx 0
  python main.py --coco_path data/coco --resume exps/batchformer/checkpoint.pth --eval"""


def with_classes(config: Config, classes: ClassMap) -> Config:
    """The Config with the classes that a data set or a checkpoint has, in place of --num_classes
    auto.
    """
    data = dataclasses.replace(config.data, num_classes=classes.num_classes)
    return dataclasses.replace(config, data=data, classes=classes)


def all_flags() -> list[tuple[dataclasses.Field, dataclasses.Field]]:
    """(group, flag) for every flag, as fields of Config and of the group's class."""
    return [(g, f) for g in _groups() for f in dataclasses.fields(_config_class(g))]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and keeps the line breaks of descriptions and
    examples.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False, (), argparse.SUPPRESS):
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {_text(action.default)})"
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str, example: str = "") -> None:
        epilog = f"example:\n  {example.strip()}" if example else None
        # abbreviations would let a typing error train something else
        super().__init__(
            prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=_HelpFormatter
        )

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 to 1")
    return value


_NOT_GIVEN: list[Any] = []  # a list that "extend" goes on from, and is another then


def _add_flag(section: Any, item: dataclasses.Field, kind: Any) -> None:
    names = list(dict.fromkeys([f"--{item.name}", f"--{item.name.replace('_', '-')}"]))
    options: dict[str, Any] = {"dest": item.name, "default": item.default, "help": item.metadata["help"]}
    if kind is bool:
        section.add_argument(*names, action="store_true", **options)
        return
    if typing.get_origin(kind) is tuple:
        options |= {"nargs": "*", "type": typing.get_args(kind)[0]}
        options |= {"action": "extend", "nargs": "+"} if item.metadata["repeat"] else {}
    else:
        options |= {"type": item.metadata["parse"] or kind, "choices": item.metadata["choices"]}
    # one metavar for both spellings keeps the help readable
    section.add_argument(
        *names, metavar=None if options.get("choices") else item.name.split("_")[-1].upper(), **options
    )


def _groups() -> list[dataclasses.Field]:
    return [item for item in dataclasses.fields(Config) if dataclasses.is_dataclass(_config_class(item))]


def _config_class(group: dataclasses.Field) -> Any:
    return group.default_factory


def _types(group: dataclasses.Field) -> dict[str, Any]:
    return typing.get_type_hints(_config_class(group))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


_POSITIVE = (
    "batch_size",
    "accumulate_steps",
    "epochs",
    "lr_drop",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "hidden_dim",
    "nheads",
    "num_queries",
    "dec_n_points",
    "enc_n_points",
    "eval_size",
    "max_size",
    "num_feature_levels",
    "log_every",
    "bt_num_layers",
    "eval_every",
    "position_embedding_scale",
    "keep",
    "dist_timeout",
    "max_image_megapixels",
)
_NOT_NEGATIVE = (
    "lr",
    "lr_backbone",
    "lr_linear_proj_mult",
    "weight_decay",
    "clip_max_norm",
    "num_workers",
    "start_epoch",
    "seed",
    "set_cost_class",
    "set_cost_bbox",
    "set_cost_giou",
    "cls_loss_coef",
    "bbox_loss_coef",
    "giou_loss_coef",
    "focal_alpha",
    "save_every",
    "max_bad_images",
    "max_nan_steps",
)


# not looked at with --eval
_TRAINING_ONLY = {f.name for f in dataclasses.fields(OptimConfig)} - {"batch_size"} | {
    "train_sizes",
    "crop_resize_sizes",
    "crop_sizes",
    "start_epoch",
    "eval_every",
    "save_every",
    "keep",
    "max_nan_steps",
}


def _check_numbers(config: Config) -> None:
    flags = {
        name: value
        for name, value in config.flags().items()
        if not (config.run.eval and name in _TRAINING_ONLY)
    }
    for item in (item for _, item in all_flags() if item.name in flags):
        choices = item.metadata["choices"]
        value = flags[item.name]
        _require(choices is None or value in choices, f"--{item.name} {value!r} must be one of {choices}")
        _require(
            not isinstance(value, float) or math.isfinite(value),
            f"--{item.name} {value} must be a finite number",
        )
    for name in filter(flags.__contains__, _POSITIVE):
        _require(flags[name] > 0, f"--{name} {flags[name]} must be above 0")
    for name in filter(flags.__contains__, _NOT_NEGATIVE):
        _require(flags[name] >= 0, f"--{name} {flags[name]} must not be negative")
    for name in filter(flags.__contains__, ("dropout", "drop_path", "ema_decay")):
        _require(0 <= flags[name] < 1, f"--{name} {flags[name]} must lie in [0, 1)")
    classes = flags["num_classes"]
    _require(
        classes == AUTO or isinstance(classes, int) and classes > 0,
        f"--num_classes {classes} must be auto, or a number above 0",
    )
    drops = flags.get("lr_drop_epochs", [])
    _require(
        all(e > 0 for e in drops) and list(drops) == sorted(set(drops)),
        f"--lr_drop_epochs {_text(drops)} must be above 0 and increasing",
    )
    costs = (config.loss.set_cost_class, config.loss.set_cost_bbox, config.loss.set_cost_giou)
    _require(
        any(costs),
        "--set_cost_class, --set_cost_bbox and --set_cost_giou can't all be 0: nothing is left to match by",
    )


def _check_unavailable(config: Config) -> None:
    later = "is not available yet: this version trains boxes only; leave it out"
    _require(not config.segmentation.masks, f"--masks {later}")
    _require(not config.segmentation.frozen_weights, f"--frozen_weights {later}")
    for name in ("mask_loss_coef", "dice_loss_coef"):
        _require(
            getattr(config.loss, name) == getattr(LossConfig, name),
            f"--{name} belongs to --masks, which {later}",
        )
    _require(config.data.dataset_file != "coco_panoptic", f"--dataset_file coco_panoptic {later}")
    _require(
        config.data.dataset_file == "coco",
        f"--dataset_file {config.data.dataset_file!r} is unknown; use coco",
    )
    _require(not config.data.coco_panoptic_path, f"--coco_panoptic_path {later}")
    _require(
        not config.data.remove_difficult, "--remove_difficult has no meaning for COCO data; leave it out"
    )


def _check_architecture(config: Config) -> None:
    backbone, transformer = config.backbone, config.transformer
    dim, heads, levels = transformer.hidden_dim, transformer.nheads, backbone.num_feature_levels
    _require(dim % heads == 0, f"--hidden_dim {dim} must be a multiple of --nheads {heads}")
    # with one channel a group, GroupNorm can't normalise a map of one pixel
    _require(
        dim % 32 == 0 and dim >= 64,
        f"--hidden_dim {dim} must be a multiple of 32, the groups of the projection's GroupNorm, "
        f"and at least 64",
    )
    _require(
        levels != 2,
        "--num_feature_levels 2 can't be used: the backbone gives one map or three; take 1, 3 or more",
    )
    _require(
        transformer.with_box_refine or not transformer.two_stage,
        "--two_stage needs --with_box_refine: its proposals are boxes that the decoder refines; "
        "add --with_box_refine",
    )
    _require(
        not backbone.dilation or BACKBONES[backbone.backbone].can_dilate,
        f"--dilation can't be used with --backbone {backbone.backbone}: its blocks have no "
        f"dilated form; use resnet50 or larger",
    )
    _require(bool(backbone.backbone_weights), "--backbone_weights is empty; use imagenet, none or a file")
    _require(
        backbone.backbone_norm != "gn"
        or backbone.backbone_weights != "imagenet"
        or config.run.starts_from_weights,
        "--backbone_norm gn can't use ImageNet weights, which belong to batch normalisation; add "
        "--backbone_weights none",
    )


def _check_batchformer(config: Config) -> None:
    bf, layers = config.batchformer, config.transformer.enc_layers
    if not bf.bf:
        for name in () if config.is_given("bf") else ("insert_idx", "eval_bf", "bt_num_layers", "share_bf"):
            given = getattr(bf, name) != getattr(BatchFormerConfig, name)
            _require(
                not given,
                f"--{name} needs BatchFormerV2; add --bf 1 (two streams) or --bf 7 (one), or leave it out",
            )
        return
    _require(
        bool(bf.insert_idx),
        f"--bf {bf.bf} needs --insert_idx: the encoder layer after which to insert, e.g. --insert_idx 0",
    )
    for index in bf.insert_idx:
        _require(
            0 <= index < layers,
            f"--insert_idx {index} must lie in [0, {layers}), below --enc_layers {layers}",
        )
    _require(
        len(set(bf.insert_idx)) == len(bf.insert_idx),
        f"--insert_idx {_text(bf.insert_idx)} names a layer twice",
    )


def _check_data(config: Config) -> None:
    data = config.data
    for image_set in ("val",) if config.run.eval else ("train", "val"):
        images, annotations = getattr(data, f"{image_set}_images"), getattr(data, f"{image_set}_annotations")
        given, lacking = ("images", "annotations") if images else ("annotations", "images")
        _require(
            bool(images) == bool(annotations), f"--{image_set}_{given} needs --{image_set}_{lacking}: add it"
        )
    if config.run.eval:
        _require(
            data.max_size >= data.eval_size,
            f"--max_size {data.max_size} must be at least --eval_size {data.eval_size}",
        )
        return
    for name in ("train_sizes", "crop_resize_sizes", "crop_sizes"):
        sizes = getattr(data, name)
        _require(bool(sizes) and min(sizes) > 0, f"--{name} {_text(sizes)} must be sizes in pixels above 0")
    _require(
        len(data.crop_sizes) == 2 and data.crop_sizes[0] <= data.crop_sizes[1],
        f"--crop_sizes {_text(data.crop_sizes)} must be two numbers, the smallest and the largest side",
    )
    largest = max(data.eval_size, *data.train_sizes)
    _require(
        data.max_size >= largest,
        f"--max_size {data.max_size} must be at least the largest of --eval_size and "
        f"--train_sizes, {largest}",
    )


def _check_run(config: Config) -> None:
    run = config.run
    _require(
        bool(run.resume) or not run.eval,
        "--eval needs --resume: the checkpoint to evaluate; add --resume <file>",
    )
    _require(
        bool(run.output_dir) or not run.save_predictions,
        "--save_predictions needs --output_dir: the folder to write to",
    )
    for name, wanted in (
        ("save_every", run.save_every > 0 and not run.eval),
        ("resume auto", run.resume == "auto"),
    ):
        _require(
            bool(run.output_dir) or not wanted, f"--{name} needs --output_dir: the folder of the checkpoints"
        )
    _require(
        bool(run.output_dir) or not run.tensorboard or run.eval,
        "--tensorboard needs --output_dir: the folder to write to",
    )
    _require(
        not run.finetune or run.resume in ("", "auto"),
        "--finetune starts a run and --resume goes on with one; give one of them (--resume auto "
        "may stand beside --finetune)",
    )
    in_folder = bool(run.output_dir) and os.path.abspath(run.output_dir) == os.path.dirname(
        os.path.abspath(run.finetune)
    )
    _require(
        not (run.finetune and in_folder),
        f"--finetune {run.finetune} is of the run in --output_dir {run.output_dir}; give the new "
        f"run another --output_dir",
    )
    _require(
        not (run.finetune and run.eval),
        "--finetune trains and --eval does not; use --resume to evaluate a checkpoint",
    )
    _require(
        run.eval or run.start_epoch < config.optim.epochs,
        f"--start_epoch {run.start_epoch} must be below --epochs {config.optim.epochs}, else "
        f"nothing is left to train",
    )


def check_trainable(config: Config) -> None:
    """Refuse what a model may be built with but a run can't be made of (main.py calls it; notebooks
    need not).

    Raises UserError.
    """
    backbone, data = config.backbone, config.data
    from_random = backbone.backbone_weights == "none" and not config.run.starts_from_weights
    _require(
        not (from_random and backbone.backbone_norm == "frozen_bn"),
        "--backbone_weights none with --backbone_norm frozen_bn can't learn: the frozen "
        "statistics fit no random network; add --backbone_norm gn (small batches) or bn",
    )
    stride = 8 if backbone.num_feature_levels > 1 else (16 if backbone.dilation else 32)
    # the resize may exceed max_size by a pixel or two, which rounds up to another cell
    longest = (LEARNED_POSITIONS - 1) * stride
    _require(
        backbone.position_embedding != "learned" or data.max_size <= longest,
        f"--position_embedding learned knows {LEARNED_POSITIONS} x {LEARNED_POSITIONS} positions, "
        f"which is images of up to {longest} pixels here; use sine, or --max_size {longest} with "
        f"smaller --eval_size and --train_sizes",
    )


def _text(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))
