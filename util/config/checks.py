"""What flags may be combined with. Ranges and choices stand in the table (util/config/fields.py).

Each check raises UserError with the remedy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from util.backbones import BACKBONES
from util.class_map import AUTO
from util.config.fields import FLAGS, RunConfig
from util.config.model_fields import LEARNED_POSITIONS
from util.errors import UserError

# The class imports this module, so that it is valid by construction; this module cannot import it.
Config: TypeAlias = Any


def require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def plain_text(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def as_typed(flags: Mapping[str, Any]) -> str:
    """Flags as on a command line, without switches that are off."""
    words = []
    for name, value in flags.items():
        if value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list | tuple) else [value])
    return " ".join(words)


def check_values(config: Config) -> None:
    """The rules of the table: what is available, choices and ranges."""
    classes = config.data.num_classes
    whole = type(classes) is int
    require(whole or classes == AUTO, f"--num_classes {classes!r} must be auto or a whole number")
    for name, value in config.flags().items():
        flag, given = FLAGS[name], f"--{name} {plain_text(value)}"
        # a flag without effect would let a user believe that it had one
        require(not flag.refused or value == flag.default, f"--{name} {flag.refused}")
        # the command of a training, with --eval added, is to evaluate
        if config.run.eval and flag.of == "training":
            continue
        require(not flag.choices or value in flag.choices, f"{given} must be one of {flag.choices}")
        # limits are for each of several numbers
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int | float):
                require(math.isfinite(number), f"{given} must be a finite number")
                require(flag.in_range(number), f"{given} must be {flag.range}")


def check_run(config: Config) -> None:
    """What holds for each group alone, whatever a checkpoint decides."""
    loss, run, optim = config.loss, config.run, config.optim
    require(
        loss.set_cost_class or loss.set_cost_bbox or loss.set_cost_giou,
        "--set_cost_class, --set_cost_bbox and --set_cost_giou can't all be 0: nothing is left to match by",
    )
    if run.finetune:
        _check_finetune(run)
    if config.segmentation.frozen_weights and not run.eval:
        _check_frozen_weights(config)
    if run.eval:
        require(run.resume, "--eval needs --resume: the checkpoint to evaluate; add --resume <file>")
    else:
        # which sizes come first decides what code is made
        require(
            not (run.compile and run.deterministic),
            "--compile can't be used with --deterministic: compiled code may round differently in a "
            "resumed run; leave one of them out",
        )
        require(
            run.start_epoch < optim.epochs,
            f"--start_epoch {run.start_epoch} must be below --epochs {optim.epochs}, else nothing is "
            "left to train",
        )
        drops = optim.lr_drop_epochs
        # a repeated epoch would divide only once
        require(list(drops) == sorted(set(drops)), f"--lr_drop_epochs {plain_text(drops)} must be increasing")

    # evaluation saves no checkpoints and writes no curves
    for flag, wanted, folder in (
        ("save_predictions", run.save_predictions, "folder to write to"),
        ("resume auto", run.resume == "auto", "folder of the checkpoints"),
        ("save_every", run.save_every and not run.eval, "folder of the checkpoints"),
        ("tensorboard", run.tensorboard and not run.eval, "folder to write to"),
    ):
        require(run.output_dir or not wanted, f"--{flag} needs --output_dir: the {folder}")


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


def _check_frozen_weights(config: Config) -> None:
    require(
        config.segmentation.masks, "--frozen_weights needs --masks: only a mask head trains then; add --masks"
    )
    require(
        not config.run.finetune,
        "--frozen_weights and --finetune both say where the training starts; give one of them: "
        "--finetune trains the whole detector",
    )
    # else it would have no effect
    require(
        not config.batchformer.bf,
        "--frozen_weights can't be used with --bf: a frozen detector computes as in evaluation, where "
        "BatchFormerV2 does not act; leave --bf out",
    )


def check_together(config: Config) -> None:
    """What flags may be combined with, once a checkpoint has decided those that were not given."""
    _check_architecture(config)
    _check_batchformer(config)
    _check_masks(config)
    _check_data(config)


def _check_architecture(config: Config) -> None:
    backbone, transformer = config.backbone, config.transformer
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
    imagenet = backbone.backbone_weights == "imagenet" and not config.starts_from_weights
    require(
        not imagenet or backbone.backbone_norm != "gn",
        "--backbone_norm gn can't use ImageNet weights, which belong to batch normalisation; add "
        "--backbone_weights none",
    )


def _check_batchformer(config: Config) -> None:
    batchformer, enc_layers = config.batchformer, config.transformer.enc_layers
    if not batchformer.bf:
        for name, value in vars(batchformer).items():
            # with --bf 0 on the command line the module is off, whatever its other flags say
            require(
                value == FLAGS[name].default or config.is_given("bf"),
                f"--{name} needs BatchFormerV2; add --bf 1 (two streams) or --bf 7 (one), or leave it out",
            )
        return

    places = batchformer.insert_idx
    require(
        places,
        f"--bf {batchformer.bf} needs --insert_idx: the encoder layer after which to insert, "
        "e.g. --insert_idx 0",
    )
    last = max(places)
    require(
        last < enc_layers,
        f"--insert_idx {last} must lie in [0, {enc_layers}), below --enc_layers {enc_layers}",
    )
    require(len(set(places)) == len(places), f"--insert_idx {plain_text(places)} names a layer twice")

    dim, heads = config.transformer.hidden_dim, batchformer.bf_heads
    require(dim % heads == 0, f"--hidden_dim {dim} must be a multiple of --bf_heads {heads}")
    # a control differs from the published setting in one thing
    others = ("eval_bf", "bf_mask_padding", "bf_across_processes")
    used = [f"--{name}" for name in others if getattr(batchformer, name)]
    require(
        batchformer.bf_control == "none" or (batchformer.bf == 1 and not used),
        f"--bf_control {batchformer.bf_control} is for --bf 1 without {', '.join(used or others)}",
    )


def _check_masks(config: Config) -> None:
    name = config.backbone.backbone
    require(
        not config.segmentation.masks or BACKBONES[name].fine,
        f"--masks can't be used with --backbone {name}, whose entry names no stage of stride 4; use resnet50",
    )
    for group, name in (
        (config.loss, "mask_loss_coef"),
        (config.loss, "dice_loss_coef"),
        (config.data, "panoptic_score"),
        (config.data, "panoptic_overlap"),
    ):
        require(
            config.segmentation.masks or getattr(group, name) == FLAGS[name].default,
            f"--{name} needs --masks; add --masks, or leave it out",
        )


def _check_data(config: Config) -> None:
    data, evaluate = config.data, config.run.eval
    require(
        not data.coco_panoptic_path or data.dataset_file == "coco_panoptic",
        "--coco_panoptic_path needs --dataset_file coco_panoptic; add it, or leave the path out",
    )
    splits = ["val"] if evaluate else ["val", "train"]
    for split in splits:
        # one alone is a forgotten flag: the other would be of the published folder
        images, annotations = getattr(data, f"{split}_images"), getattr(data, f"{split}_annotations")
        require(annotations or not images, f"--{split}_images needs --{split}_annotations: add it")
        require(images or not annotations, f"--{split}_annotations needs --{split}_images: add it")
    # else no image would reach the shorter side
    require(
        data.max_size >= data.eval_size,
        f"--max_size {data.max_size} must be at least --eval_size {data.eval_size}",
    )
    if evaluate:
        return

    # the same for training, with each size that may be drawn
    require(data.train_sizes, "--train_sizes must be sizes in pixels")
    require(data.crop_resize_sizes, "--crop_resize_sizes must be sizes in pixels")
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


def check_trainable(config: Config) -> None:
    """Raise UserError for what a model may be built with, but a training can't start from."""
    backbone = config.backbone
    # frozen statistics are 0 and 1 until weights are loaded
    from_random = backbone.backbone_weights == "none" and not config.starts_from_weights
    require(
        not from_random or backbone.backbone_norm != "frozen_bn",
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
        backbone.position_embedding != "learned" or config.data.max_size <= longest,
        f"--position_embedding learned knows {LEARNED_POSITIONS} x {LEARNED_POSITIONS} positions, "
        f"which is images of up to {longest} pixels here; use sine, or --max_size {longest} with "
        "smaller --eval_size and --train_sizes",
    )
