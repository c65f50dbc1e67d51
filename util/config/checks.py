"""What flags may be combined with. Ranges and choices stand in the table (util/config/fields.py).

Each check takes the groups that its rules are about, and raises UserError with the remedy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from util.backbones import BACKBONES
from util.config.fields import FLAGS, DataConfig, OptimConfig, RunConfig
from util.config.model_fields import (
    LEARNED_POSITIONS,
    BackboneConfig,
    BatchFormerConfig,
    LossConfig,
    TransformerConfig,
)
from util.errors import UserError


def require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def plain_text(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def check_values(values: Mapping[str, Any], evaluate: bool) -> None:
    """The rules of the table: what is available, choices and ranges; `values` as `Config.flags`."""
    for name, value in values.items():
        flag = FLAGS[name]
        # a flag without effect would let a user believe that it had one
        require(not flag.refused or value == flag.default, f"--{name} {flag.refused}")
        # the command of a training, with --eval added, is to evaluate
        if evaluate and flag.of == "training":
            continue
        require(
            flag.choices is None or value in flag.choices, f"--{name} {value!r} must be one of {flag.choices}"
        )
        # limits are for each of several numbers
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int | float):
                given = f"--{name} {plain_text(value)}"
                require(math.isfinite(number), f"{given} must be a finite number")
                require(flag.in_range(number), f"{given} must be {flag.range}")


def check_loss(loss: LossConfig) -> None:
    require(
        loss.set_cost_class or loss.set_cost_bbox or loss.set_cost_giou,
        "--set_cost_class, --set_cost_bbox and --set_cost_giou can't all be 0: nothing is left to match by",
    )


def check_architecture(backbone: BackboneConfig, transformer: TransformerConfig, run: RunConfig) -> None:
    dim, heads = transformer.hidden_dim, transformer.nheads
    require(dim % heads == 0, f"--hidden_dim {dim} must be a multiple of --nheads {heads}")
    # with one channel a group, GroupNorm can't normalise a map of one pixel
    require(
        dim % 32 == 0 and dim >= 64,
        f"--hidden_dim {dim} must be a multiple of 32, the groups of the projection's GroupNorm, "
        "and at least 64",
    )
    # one map is the last stage, three are the last three stages; more are convolutions of these
    require(
        backbone.num_feature_levels != 2,
        "--num_feature_levels 2 can't be used: the backbone gives one map or three; take 1, 3 or more",
    )
    require(
        transformer.with_box_refine or not transformer.two_stage,
        "--two_stage needs --with_box_refine: its proposals are boxes that the decoder refines; "
        "add --with_box_refine",
    )
    # torchvision has no dilated BasicBlock
    require(
        not backbone.dilation or BACKBONES[backbone.backbone].can_dilate,
        f"--dilation can't be used with --backbone {backbone.backbone}: its blocks have no "
        "dilated form; use resnet50 or larger",
    )
    # a shell variable that is not set gives an empty text
    require(backbone.backbone_weights, "--backbone_weights is empty; use imagenet, none or a file")
    # weights of a checkpoint were trained with its own norm
    require(
        backbone.backbone_norm != "gn" or backbone.backbone_weights != "imagenet" or run.starts_from_weights,
        "--backbone_norm gn can't use ImageNet weights, which belong to batch normalisation; add "
        "--backbone_weights none",
    )


def check_batchformer(config: BatchFormerConfig, transformer: TransformerConfig, bf_given: bool) -> None:
    """bf_given: with --bf 0 on the command line the module is off, whatever its other flags say."""
    if not config.bf:
        for name, flag in FLAGS.items():
            if flag.group == "batchformer" and not bf_given:
                require(
                    getattr(config, name) == flag.default,
                    f"--{name} needs BatchFormerV2; add --bf 1 (two streams) or --bf 7 (one), or "
                    "leave it out",
                )
        return

    places, enc_layers = config.insert_idx, transformer.enc_layers
    require(
        places,
        f"--bf {config.bf} needs --insert_idx: the encoder layer after which to insert, e.g. --insert_idx 0",
    )
    for place in places:
        require(
            0 <= place < enc_layers,
            f"--insert_idx {place} must lie in [0, {enc_layers}), below --enc_layers {enc_layers}",
        )
    require(len(set(places)) == len(places), f"--insert_idx {plain_text(places)} names a layer twice")


def check_data(data: DataConfig, evaluate: bool) -> None:
    _check_both("val", data.val_images, data.val_annotations)
    # else no image would reach the shorter side
    require(
        data.max_size >= data.eval_size,
        f"--max_size {data.max_size} must be at least --eval_size {data.eval_size}",
    )
    if evaluate:
        return

    # the same for training, with each size that may be drawn
    _check_both("train", data.train_images, data.train_annotations)
    for name in ("train_sizes", "crop_resize_sizes"):
        require(getattr(data, name), f"--{name} must be sizes in pixels")
    sides = data.crop_sizes
    require(
        len(sides) == 2 and sides[0] <= sides[1],
        f"--crop_sizes {plain_text(sides)} must be two numbers, the smallest and the largest side",
    )
    largest = max(data.train_sizes)
    require(
        data.max_size >= largest,
        f"--max_size {data.max_size} must be at least the largest of --train_sizes, {largest}",
    )


def _check_both(image_set: str, images: str, annotations: str) -> None:
    # one alone is a forgotten flag: the other would be of the published folder
    images_flag, annotations_flag = f"--{image_set}_images", f"--{image_set}_annotations"
    require(annotations or not images, f"{images_flag} needs {annotations_flag}: add it")
    require(images or not annotations, f"{annotations_flag} needs {images_flag}: add it")


def check_run(run: RunConfig, optim: OptimConfig) -> None:
    require(
        run.resume or not run.eval,
        "--eval needs --resume: the checkpoint to evaluate; add --resume <file>",
    )
    if not run.eval:
        require(
            run.start_epoch < optim.epochs,
            f"--start_epoch {run.start_epoch} must be below --epochs {optim.epochs}, else nothing is "
            "left to train",
        )
        drops = optim.lr_drop_epochs
        # a repeated epoch would divide only once
        require(list(drops) == sorted(set(drops)), f"--lr_drop_epochs {plain_text(drops)} must be increasing")
    if not run.output_dir:
        _check_without_folder(run)
    if run.finetune:
        _check_finetune(run)


def _check_without_folder(run: RunConfig) -> None:
    require(not run.save_predictions, "--save_predictions needs --output_dir: the folder to write to")
    require(run.resume != "auto", "--resume auto needs --output_dir: the folder of the checkpoints")
    # evaluation saves no checkpoints and writes no curves
    require(run.eval or not run.save_every, "--save_every needs --output_dir: the folder of the checkpoints")
    require(run.eval or not run.tensorboard, "--tensorboard needs --output_dir: the folder to write to")


def _check_finetune(run: RunConfig) -> None:
    require(
        run.resume in ("", "auto"),
        "--finetune starts a run and --resume goes on with one; give one of them (--resume auto "
        "may stand beside --finetune)",
    )
    # its checkpoints would be replaced by those of the new run
    own_folder = os.path.dirname(os.path.abspath(run.finetune))
    require(
        not run.output_dir or os.path.abspath(run.output_dir) != own_folder,
        f"--finetune {run.finetune} is of the run in --output_dir {run.output_dir}; give the new "
        "run another --output_dir",
    )
    require(not run.eval, "--finetune trains and --eval does not; use --resume to evaluate a checkpoint")


def check_start(backbone: BackboneConfig, data: DataConfig, run: RunConfig) -> None:
    """What a model may be built with, but a training can't start from."""
    # frozen statistics are 0 and 1 until weights are loaded
    from_random = backbone.backbone_weights == "none" and not run.starts_from_weights
    require(
        not (from_random and backbone.backbone_norm == "frozen_bn"),
        "--backbone_weights none with --backbone_norm frozen_bn can't learn: the frozen "
        "statistics fit no random network; add --backbone_norm gn (small batches) or bn",
    )

    # the stride of the largest map decides how many positions an image has
    stride = 32
    if backbone.num_feature_levels > 1:
        stride = 8
    elif backbone.dilation:
        stride = 16
    # the resize may exceed max_size by a pixel or two, which rounds up to another cell
    longest = (LEARNED_POSITIONS - 1) * stride
    require(
        backbone.position_embedding != "learned" or data.max_size <= longest,
        f"--position_embedding learned knows {LEARNED_POSITIONS} x {LEARNED_POSITIONS} positions, "
        f"which is images of up to {longest} pixels here; use sine, or --max_size {longest} with "
        "smaller --eval_size and --train_sizes",
    )
