"""The detector of Hugging Face's transformers, of the same configuration, to be timed beside ours."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from models.weights.hugging_face import json_of, unknown_to_transformers
from util.config import Config
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.step.precision import autocast
from util.step.updater import build_updater

# --backbone -> its ResNet: kind of block, width of the first stage, blocks of each
RESNETS = {
    "resnet18": ("basic", 64, (2, 2, 2, 2)),
    "resnet34": ("basic", 64, (3, 4, 6, 3)),
    "resnet50": ("bottleneck", 256, (3, 4, 6, 3)),
    "resnet101": ("bottleneck", 256, (3, 4, 23, 3)),
}
# parameters that the published program does not train
FROZEN = ("embedder.", "encoder.stages.0.")
# flags that name parameters, in its names
NAMES = {"lr_backbone_names": ["backbone."]}


def detector(
    config: Config,
    device: torch.device,
    images: NestedTensor,
    targets: list[dict[str, Tensor]],
    training: bool,
) -> tuple[str, Callable[[], None]]:
    """Name and version of the library, and its inference or its training step with our optimiser.

    Raises UserError if it is not installed, or has nothing equal to a flag.
    """
    library = _library()
    _refuse_unknown(config)
    model = _build(library, config).to(device).train(training)
    # its image processor normalises before the detector does; noise need not be exact
    given = {"pixel_values": images.tensors.float() / 255, "pixel_mask": (~images.mask).long()}
    amp = config.run.amp

    def infer() -> None:
        with torch.no_grad(), autocast(amp, device):
            model(**given)

    name = f"transformers {library.__version__}"
    if not training:
        return name, infer
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    updater = build_updater(model, config.with_flags(NAMES))

    def step() -> None:
        # it computes its losses in its forward
        with autocast(amp, device):
            outputs = model(**given, labels=labels)
        updater.backward(outputs.loss, 1)
        updater.step()

    return name, step


def _library() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"--against transformers needs the package transformers ({error}); pip install transformers"
        ) from None


def _refuse_unknown(config: Config) -> None:
    unknown = unknown_to_transformers(config)
    if config.backbone.backbone not in RESNETS:
        unknown = f"--backbone {config.backbone.backbone} here, only {', '.join(RESNETS)}"
    elif config.backbone.backbone_norm != "frozen_bn":
        unknown = f"--backbone_norm {config.backbone.backbone_norm}"
    elif config.backbone.dilation:
        unknown = "--dilation in its own ResNet"
    elif config.transformer.drop_path:
        unknown = "--drop_path"
    elif config.segmentation.masks:
        unknown = "--masks"
    if unknown:
        raise UserError(f"--against transformers: it has no Deformable DETR with {unknown}")


def _build(library: Any, config: Config) -> Any:
    """Its detector with random weights."""
    # its own ResNet, so that timm need not be there
    block, width, depths = RESNETS[config.backbone.backbone]
    stages = ["stage2", "stage3", "stage4"]
    resnet = library.ResNetConfig(
        layer_type=block,
        depths=depths,
        hidden_sizes=[width * 2**stage for stage in range(4)],
        out_features=stages if config.backbone.num_feature_levels > 1 else stages[-1:],
    )
    fields = json_of(config, None, int(config.data.num_classes)) | {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": resnet,
        "auxiliary_loss": not config.loss.no_aux_loss,
    }
    model = library.DeformableDetrForObjectDetection(library.DeformableDetrConfig(**fields))
    # it freezes parameters by names of timm, and with these all of the ResNet
    for name, parameter in model.model.backbone.model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return model
