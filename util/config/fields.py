"""The table of flags: everything that the program knows about a flag is in its field.

A frozen dataclass for each group, a field for each flag. The command line, the checks of values, what
a checkpoint decides, what may change on resume, and docs/flags.md are read from `FLAGS`. A new flag
needs a field, here or in model_fields.py, and the place that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.class_map import AUTO
from util.config.flag import flag, table_of
from util.config.model_fields import (
    BackboneConfig,
    BatchFormerConfig,
    LossConfig,
    SegmentationConfig,
    TransformerConfig,
)


def number_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


number_or_auto.__name__ = "number"  # argparse's messages show it


@dataclass(frozen=True)
class OptimConfig:
    """optimiser"""

    of = "training"

    lr: float = flag(2e-4, "learning rate of the transformer and the heads")
    lr_backbone_names: tuple[str, ...] = flag(
        ("backbone.0",), "parameters whose name contains one of these use --lr_backbone", "NAME"
    )
    lr_backbone: float = flag(2e-5, "learning rate of the backbone; 0 freezes it", "LR")
    # as published: the points of attention move slowly
    lr_linear_proj_names: tuple[str, ...] = flag(
        ("reference_points", "sampling_offsets"),
        "parameters whose name contains one of these use --lr x --lr_linear_proj_mult",
        "NAME",
    )
    lr_linear_proj_mult: float = flag(0.1, "factor on --lr for --lr_linear_proj_names", "FACTOR")
    # evaluation has batches too
    batch_size: int = flag(
        2,
        "images per process and step; BatchFormerV2 relates these images to each other",
        "IMAGES",
        above=0,
        of="data",
    )
    accumulate_steps: int = flag(
        1,
        "batches whose gradients are averaged before an optimiser step; does not enlarge "
        "BatchFormerV2's batch",
        "BATCHES",
        above=0,
    )
    weight_decay: float = flag(1e-4, "weight decay of AdamW or SGD")
    # a finished run may be continued
    epochs: int = flag(50, "number of epochs of the whole run", above=0, free_on_resume=True)
    lr_drop: int = flag(40, "divide the learning rates by 10 every so many epochs", "EPOCHS", above=0)
    lr_drop_epochs: tuple[int, ...] = flag(
        (), "divide the learning rates by 10 from these epochs on (counted from 0) instead", "EPOCH", above=0
    )
    clip_max_norm: float = flag(0.1, "clip the norm of the gradient to this; 0 does not clip")
    sgd: bool = flag(False, "SGD with momentum 0.9 instead of AdamW")
    ema_decay: float = flag(
        0.0,
        "keep an exponential moving average of the weights with this decay (for example 0.9998); 0: none",
        below=1,
    )


@dataclass(frozen=True)
class DataConfig:
    """data"""

    of = "data"

    # of the published program, whose scripts give it
    dataset_file: str = flag(
        "coco", "kind of data set: coco, or coco_panoptic, where stuff has segments too", "KIND"
    )
    # a folder may move: the contents of the data are compared, not their place
    coco_path: str = flag(
        "./data/coco",
        "folder with train2017, val2017 and annotations/instances_{train,val}2017.json",
        "FOLDER",
        free_on_resume=True,
    )
    train_images: str = flag(
        "",
        "folder of the images to train on, instead of train2017 in --coco_path",
        "FOLDER",
        free_on_resume=True,
    )
    train_annotations: str = flag(
        "", "annotations of --train_images: a COCO instances file", "FILE", free_on_resume=True
    )
    val_images: str = flag(
        "",
        "folder of the images to evaluate on, instead of val2017 in --coco_path",
        "FOLDER",
        free_on_resume=True,
    )
    val_annotations: str = flag(
        "", "annotations of --val_images: a COCO instances file", "FILE", free_on_resume=True
    )
    coco_panoptic_path: str = flag(
        "",
        "with --dataset_file coco_panoptic: folder with annotations/panoptic_{train,val}2017.json and "
        "panoptic_{train,val}2017; default: that of --coco_path",
        "FOLDER",
        free_on_resume=True,
    )
    panoptic_score: float = flag(
        0.3,
        "a panoptic map is made of the detections that score more",
        "SCORE",
        below=1,
        of="evaluation",
        in_tools=True,
    )
    panoptic_overlap: float = flag(
        0.8,
        "a segment of a panoptic map that others cover more, so that less than this share of its mask is "
        "seen, is left out",
        "SHARE",
        below=1,
        of="evaluation",
        in_tools=True,
    )
    remove_difficult: bool = flag(
        False, "not used by COCO data", refused="has no meaning for COCO data; leave it out"
    )
    num_classes: int | str = flag(
        AUTO,
        "number of class logits. auto: as many as the annotations have categories, whatever their ids; 91 "
        "for COCO's own categories, as published. A number: category ids are labels, in [0, "
        "num_classes)",
        "N|auto",
        above=0,
        parse=number_or_auto,
    )
    # how images are read does not change them
    cache_mode: bool = flag(
        False, "keep the image files in memory; every process keeps all of them", free_on_resume=True
    )
    num_workers: int = flag(
        2,
        "loader processes per training process; 0 loads in the training process",
        "PROCESSES",
        free_on_resume=True,
    )
    # multiples of the stride of the last map of the backbone
    train_sizes: tuple[int, ...] = flag(
        tuple(range(480, 801, 32)), "shorter sides to train with, in pixels", "PIXELS", above=0, of="training"
    )
    # they decide the AP, and nothing in the weights shows them
    eval_size: int = flag(
        800, "shorter side in evaluation, in pixels", "PIXELS", above=0, of="evaluation", in_tools=True
    )
    max_size: int = flag(
        1333, "limit of the longer side, in pixels", "PIXELS", above=0, of="evaluation", in_tools=True
    )
    crop_resize_sizes: tuple[int, ...] = flag(
        (400, 500, 600), "shorter sides before a random crop, in pixels", "PIXELS", above=0, of="training"
    )
    crop_sizes: tuple[int, ...] = flag(
        (384, 600),
        "smallest and largest side of the random crop, in pixels",
        "PIXELS",
        above=0,
        of="training",
    )
    augmentation: str = flag(
        "published",
        "published (flip, scale, crop), flip (flip and scale) or none (scale only)",
        choices=("published", "flip", "none"),
        of="training",
    )
    on_bad_image: str = flag(
        "stop",
        "stop, or skip an image that can't be read: training uses the next one in its place",
        choices=("stop", "skip"),
    )
    max_bad_images: int = flag(
        100,
        "with --on_bad_image skip: end the run when a process has met more bad files than this",
        "FILES",
        free_on_resume=True,
    )
    # a small file may be a huge image, which would fill the memory
    max_image_megapixels: float = flag(
        100.0, "refuse larger images before they are decoded", above=0, free_on_resume=True
    )

    def images_folder(self, image_set: str) -> Path:
        """Where the images of "train" or "val" are."""
        given = getattr(self, f"{image_set}_images")
        return Path(given or f"{self.coco_path}/{image_set}2017")

    def annotations_file(self, image_set: str) -> Path:
        """The COCO file of "train" or "val", of instances or panoptic."""
        folder, kind = self.coco_path, "instances"
        if self.dataset_file == "coco_panoptic":
            folder, kind = self.coco_panoptic_path or folder, "panoptic"
        given = getattr(self, f"{image_set}_annotations")
        return Path(given or f"{folder}/annotations/{kind}_{image_set}2017.json")


@dataclass(frozen=True)
class RunConfig:
    """run"""

    of = "run"
    free_on_resume = True  # where and how often, not what

    output_dir: str = flag("", "folder of checkpoints and logs; nothing is saved without it", "FOLDER")
    device: str = flag("", "cuda, cpu, cuda:1, mps; default: cuda if there is one, else cpu")
    # these five change what is learned
    seed: int = flag(42, "seed of weights, data order and augmentation", free_on_resume=False)
    amp: str = flag(
        "off",
        "mixed precision: bf16, or fp16 with a gradient scaler",
        choices=("off", "bf16", "fp16"),
        free_on_resume=False,
    )
    float32_matmul: str = flag(
        "highest",
        "float32 products on an Nvidia GPU; high: in TF32, faster and less exact, but for the heads",
        choices=("highest", "high"),
        free_on_resume=False,
    )
    deterministic: bool = flag(
        False,
        "bit-identical results in every run on the same machine, or an error that names what can't be",
        free_on_resume=False,
    )
    on_nan: str = flag(
        "stop",
        "stop, or skip a step whose loss or gradient is not finite (its batch is saved)",
        choices=("stop", "skip"),
        free_on_resume=False,
    )
    resume: str = flag(
        "",
        "a checkpoint to resume from or to evaluate, which decides the architecture: a path, an https "
        "address, or auto: the newest good one in --output_dir",
        "FILE|URL|auto",
    )
    finetune: str = flag(
        "",
        "start from the weights of this checkpoint (ours, published, or Hugging Face's), which "
        "decides the architecture; a path or an https address",
        "FILE|URL",
    )
    # these six concern only a training
    start_epoch: int = flag(0, "first epoch, counted from 0, for a checkpoint without one", of="training")
    eval_every: int = flag(
        1, "evaluate after every so many epochs, and after the last", "EPOCHS", above=0, of="training"
    )
    save_every: int = flag(
        0,
        "save every so many steps too; 0: after every epoch and on a signal only",
        "STEPS",
        of="training",
    )
    keep: int = flag(
        2,
        "how many of the last checkpoints are kept, besides those of the published schedule",
        "CHECKPOINTS",
        above=0,
        of="training",
    )
    max_nan_steps: int = flag(
        10, "with --on_nan skip: end the run after more than so many such steps", of="training"
    )
    # the numbers are the same up to rounding
    compile: bool = flag(
        False,
        "train with torch.compile: blocks of the backbone, layers and heads; takes minutes at the start, and "
        "does not pay on a CPU",
        of="training",
    )
    eval: bool = flag(False, "evaluate only; image sizes that are not given are those of the checkpoint")
    coco_eval: str = flag(
        "faster",
        "what computes COCO's metrics: faster (faster-coco-eval) or pycocotools; results are equal",
        choices=("faster", "pycocotools"),
    )
    dist_timeout: int = flag(
        1800,
        "seconds that a process waits for the others, or for its loader, before the run ends",
        "SECONDS",
        above=0,
    )
    save_predictions: bool = flag(
        False, "write the detections to predictions.json in --output_dir (COCO results format)"
    )
    tensorboard: bool = flag(
        False, "write losses, rates, metrics and pictures for TensorBoard to tensorboard/ in --output_dir"
    )
    log_every: int = flag(10, "steps between log lines", "STEPS", above=0)


# the order of --help, docs/flags.md and logs
GROUPS: dict[str, Any] = {
    "batchformer": BatchFormerConfig,
    "optim": OptimConfig,
    "backbone": BackboneConfig,
    "transformer": TransformerConfig,
    "segmentation": SegmentationConfig,
    "loss": LossConfig,
    "data": DataConfig,
    "run": RunConfig,
}


FLAGS = table_of(GROUPS)


def flags_of(*roles: str) -> tuple[str, ...]:
    """Names of the flags of these roles, without those that are refused, in the order of the table."""
    return tuple(name for name, flag in FLAGS.items() if flag.of in roles and not flag.refused)
