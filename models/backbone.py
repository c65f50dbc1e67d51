"""A torchvision ResNet as a source of feature maps.

Shape letters: B images, H x W pixels; level l has C_l channels and stride s_l.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.nested_tensor import NestedTensor


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's, which gives float32 for bfloat16 and float16; this one keeps the type of its
    input.

    Maps twice as large would undo most of what mixed precision saves.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.dtype == self.weight.dtype:
            return super().forward(x_BCHW)
        return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm,
    "bn": nn.BatchNorm2d,
    "gn": partial(nn.GroupNorm, 32),
}


class ResNetBody(nn.Module):
    """The layers of a torchvision ResNet under their own names, without its classifier.

    `channels` of the maps are read off the network.
    """

    def __init__(self, resnet: nn.Module, multi_scale: bool) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(resnet, name))
        self._outputs = ("layer2", "layer3", "layer4") if multi_scale else ("layer4",)
        self.channels = [_out_channels(getattr(resnet, name)) for name in self._outputs]

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images_B3HW))))
        x = self.layer1(x)
        maps = []
        for name in ("layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
            if name in self._outputs:
                maps.append(x)
        return maps


class Backbone(nn.Module):
    """Feature maps with their padding masks.

    Args:
        body: the network.
        train_layers: whether layer2 to layer4 train.
        freeze_stem: whether all but layer2 to layer4 (conv1, layer1) stays as it is, as published
            (a random stem must learn).

    Raises:
        ValueError: it should train, and the body has no parameters of these names, so that all of
        it would be frozen.
    """

    def __init__(self, body: ResNetBody, train_layers: bool, freeze_stem: bool) -> None:
        super().__init__()
        self.body = body
        self.channels = body.channels
        for name, parameter in body.named_parameters():
            in_stem = not name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(train_layers and not (in_stem and freeze_stem))
        if train_layers and not any(parameter.requires_grad for parameter in body.parameters()):
            raise ValueError(
                f"{type(body).__name__} has no parameter whose name begins with layer2, layer3 or "
                f"layer4, which are those that "
                "train: all would be frozen. Name its stages so, or give freeze_stem=False"
            )

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """B images -> per level a [B, C_l, H / s_l, W / s_l] map with its mask."""
        return [NestedTensor(x, resize_mask(images.mask, x.shape[-2:])) for x in self.body(images.tensors)]


def resize_mask(mask_BHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest resize of a bool mask to (height, width)."""
    return F.interpolate(mask_BHW[:, None].float(), size=tuple(size)).to(torch.bool)[:, 0]


def build_resnet(name: str, norm: str, weights: str, dilation: bool) -> nn.Module:
    """A torchvision ResNet.

    Args:
        name: e.g. "resnet50".
        norm: a key of NORMS.
        weights: "imagenet" (ImageNet V1), "none", or a file with a state dict of torchvision's
            names.
        dilation: dilate the last stage instead of striding (DC5).

    Raises:
        UserError: the weights can't be had or don't fit.
    """
    build = partial(
        getattr(torchvision.models, name),
        norm_layer=NORMS[norm],
        replace_stride_with_dilation=[False, False, dilation],
        weights=None,
    )
    resnet = build()
    if weights == "none":
        return resnet
    state = _imagenet_weights(name) if weights == "imagenet" else _file_weights(weights)
    _load_body(resnet, state, weights)
    return resnet


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(name)
    # resnext101_64x4d has no V1
    chosen = getattr(weights, "IMAGENET1K_V1", None) or weights.DEFAULT
    try:
        return chosen.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"--backbone_weights imagenet: the ImageNet weights of {name} could not be downloaded "
            f"({error}). Put {chosen.url} into {cache}, or name a file with --backbone_weights "
            f"<file>, or start from random weights with "
            "--backbone_weights none --backbone_norm gn"
        ) from None


def _file_weights(path: str) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(path, flag="--backbone_weights")
    return checkpoint.get("state_dict", checkpoint.get("model", checkpoint))


def _load_body(resnet: nn.Module, state: dict[str, Tensor], source: str) -> None:
    own = resnet.state_dict()
    wrong = [
        k
        for k, v in own.items()
        if not k.startswith("fc.")
        and not k.endswith("num_batches_tracked")
        and (k not in state or state[k].shape != v.shape)
    ]
    if wrong:
        raise UserError(
            f"--backbone_weights {source} does not fit --backbone and --backbone_norm: "
            f"{len(wrong)} tensors are missing or of another shape, {wrong[0]} first"
        )
    fitting = {k: v for k, v in state.items() if k in own and not k.startswith("fc.")}
    resnet.load_state_dict(fitting, strict=False)


def _out_channels(layer: nn.Sequential) -> int:
    block = layer[-1]
    return getattr(block, "conv3", block.conv2).out_channels
