"""load_detector: a checkpoint, or an exported file, as a function of images."""

from __future__ import annotations

import os
from typing import Any

import torch

from models.build import build_model
from models.detector import Detector
from models.export.detector import load_exported
from models.inference import prepare_for_inference
from models.weights.architecture import config_of
from models.weights.load import choose_weights, read_trained
from util.checkpoint import is_exported, load_state
from util.class_map import classes_of, unnamed_classes
from util.config import WEIGHTS, DataConfig
from util.distributed.processes import choose_device
from util.errors import UserError
from util.step.precision import LOW_TYPES
from util.step.precision_check import check_precision


def load_detector(
    checkpoint: str | os.PathLike,
    *,
    device: str | torch.device = "",
    amp: str = "off",
    batch_size: int = 1,
    score_threshold: float = 0.0,
    weights: str = "auto",
    max_image_megapixels: float = DataConfig.max_image_megapixels,
    batchformer: bool = False,
    **architecture: Any,
) -> Detector:
    """The detector of a checkpoint: published, ours or Hugging Face's; or of an exported file.

    Nothing in the file is executed, unless it is a .pt2: open only those that you trust.

    Args:
        checkpoint: a path or an https address; for Hugging Face's that of the folder, its
            safetensors file or the model's page; the path of an .onnx or .pt2 of tools/export.py.
        device: "cuda", "cuda:1", "mps" or "cpu"; by default CUDA where there is one, else the CPU. An
            exported file runs on "cpu", its default, or "cuda".
        amp: mixed precision, "off", "bf16" or "fp16".
        batch_size: images that the network gets at once, of a list.
        score_threshold: leave out detections that score less, from 0 to 1.
        max_image_megapixels: refuse larger files.
        weights: "ema" the averaged weights (--ema_decay), "model" the others, "auto" the averaged
            where the file has them, unless their last evaluation was worse.
        batchformer: with the modules of BatchFormerV2, which act in training alone:
            models.inspection.as_in_training.
        architecture: flags of main.py for what the checkpoint does not say, such as nheads
            (models/weights/architecture.py); and eval_size and max_size, the sides that images are resized
            to, which go before what it says.

    Raises:
        UserError (a ValueError): the file can't be read, holds no detector, or contradicts
        `architecture`; an option can't be.
    """
    source = os.fspath(checkpoint)
    if weights not in WEIGHTS:
        raise UserError(f"--weights {weights!r} must be one of {', '.join(WEIGHTS)}")
    if amp not in ("off", *LOW_TYPES):
        raise UserError(f"--amp {amp!r} must be one of off, {', '.join(LOW_TYPES)}")
    if is_exported(source):
        return load_exported(
            source,
            device=str(device),
            amp=amp,
            weights=weights,
            batchformer=batchformer,
            flags=architecture,
            batch_size=batch_size,
            score_threshold=score_threshold,
            max_image_megapixels=max_image_megapixels,
        )

    # the weights, and what they say of the architecture
    where = choose_device(str(device))
    content = read_trained(source, "--resume")
    chosen, _ = choose_weights(content, source, "--resume", weights)
    config = config_of({**content, "model": chosen}, source, batchformer=batchformer, **architecture)
    classes = classes_of(content, source) or unnamed_classes(chosen)

    # the model, with an operator that works in this precision
    model, _, _ = build_model(config, classes)
    load_state(model, {"model": chosen}, source).require_same_architecture()
    check_precision(model.to(where), amp)
    prepare_for_inference(model, amp)
    return Detector(
        model,
        config,
        classes,
        amp=amp,
        batch_size=batch_size,
        score_threshold=score_threshold,
        max_image_megapixels=max_image_megapixels,
    )
