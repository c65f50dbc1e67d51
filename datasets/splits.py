"""The splits of a run: training and validation data, checked, with their loaders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from datasets import DetectionData, build_dataset
from datasets.bad_images import BadImages
from datasets.loader import DeviceBatches, build_loader
from datasets.preflight.quick import quick_check
from datasets.samplers import EvalBatches, TrainBatches
from util.checkpoint import weights_of
from util.class_map import AUTO, ClassMap, classes_of, unnamed_classes
from util.config import Config
from util.distributed.processes import broadcast_from_main, is_main, rank, world_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Both splits of a training. order: which images the training batches hold."""

    train: DetectionData
    val: DetectionData
    order: TrainBatches
    bad_images: BadImages
    batches: DeviceBatches
    val_batches: DeviceBatches

    @property
    def classes(self) -> ClassMap:
        return self.train.classes


def open_training_data(
    config: Config, device: torch.device, checkpoint: Mapping[str, Any] | None = None, source: str = ""
) -> TrainingData:
    """Open and check both splits.

    Args:
        checkpoint: to resume, if there is one; source: its name for messages.

    Raises:
        UserError: data that would end the run later, or other classes than the checkpoint's.
    """
    # both splits with the classes of the training data
    train = build_dataset("train", config)
    val = build_dataset("val", config, train.classes)
    _check(train, val, config)
    check_classes(train.classes, checkpoint, source)
    # only an evaluation compares with it, and loader workers would inherit it
    del train.coco

    # one record of bad images, which a checkpoint keeps
    bad_images = BadImages(config.data.on_bad_image, config.data.max_bad_images)
    order = TrainBatches(len(train), config.optim.batch_size, rank(), world_size(), config.run.seed)
    timeout = _loader_timeout(config)
    batches = build_loader(train, order, config.data.num_workers, device, bad_images, timeout=timeout)
    val_batches = evaluation_loader(val, config, device, bad_images)
    return TrainingData(train, val, order, bad_images, batches, val_batches)


def open_evaluation_data(config: Config, checkpoint: Mapping[str, Any], source: str) -> DetectionData:
    """The validation split, labelled as the class heads of the checkpoint are.

    Args:
        source: name of the checkpoint for messages.
    """
    # --num_classes has priority over the classes of the checkpoint
    classes = None
    if config.data.num_classes == AUTO:
        classes = classes_of(checkpoint, source)
    dataset = build_dataset("val", config, classes)
    logits = unnamed_classes(weights_of(checkpoint, source)).num_classes
    known = classes or config.data.num_classes != AUTO
    if not known and dataset.classes.num_classes != logits:
        # A published checkpoint on data with another number of categories.
        log.warning(
            "%s does not name its classes; category ids are taken for the numbers of its %d logits",
            source,
            logits,
        )
        dataset = build_dataset("val", config.with_flags({"num_classes": logits}))
    check_classes(dataset.classes, checkpoint, source)
    return dataset


def evaluation_loader(
    dataset: DetectionData,
    config: Config,
    device: torch.device,
    bad_images: BadImages | None = None,
    num_images: int | None = None,
) -> DeviceBatches:
    """The batches of `dataset`, or of its first `num_images`, that this process evaluates."""
    bad_images = bad_images or BadImages(config.data.on_bad_image, config.data.max_bad_images)
    # without replacement: every image counts once
    batches = EvalBatches(num_images or len(dataset), config.optim.batch_size, rank(), world_size())
    return build_loader(
        dataset,
        batches,
        config.data.num_workers,
        device,
        bad_images,
        replace=False,
        timeout=_loader_timeout(config),
    )


def check_classes(classes: ClassMap, checkpoint: Mapping[str, Any] | None, source: str) -> None:
    """Print the classes of the data. Raises UserError if the checkpoint was trained on others."""
    # a published checkpoint does not say its classes
    trained = None
    if checkpoint and "classes" in checkpoint:
        trained = classes_of(checkpoint, source)
    if trained:
        classes.require_same(trained, source)
    names = ", ".join(classes.names.values())
    if len(names) > 200:
        names = f"{names[:200]} ..."
    log.info("%d classes: %s", len(classes.categories), names)


def _check(train: DetectionData, val: DetectionData, config: Config) -> None:
    """The quick part of tools/check_data.py on the main process; every process raises what it finds."""
    # one process looks, because the file system is slow; all end with the same message
    error = None
    if is_main():
        skip_missing = config.data.on_bad_image == "skip"
        error = quick_check(train, val, skip_missing, config.transformer.num_queries)
    error = broadcast_from_main(error)
    if error:
        raise error


def _loader_timeout(config: Config) -> int:
    """Seconds to wait for a batch.

    In a job of several processes the exchange between them times out first, and its message names
    the process that waits for its loader.
    """
    if world_size() == 1:
        return config.run.dist_timeout
    return 2 * config.run.dist_timeout
