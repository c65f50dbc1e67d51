"""The networks that --backbone offers, one entry each.

To add a network, write a function that builds it and add an entry to `_ENTRIES`: the flag, the
detector, checkpoints and Hugging Face's layout read it from there. This file imports no torch, so
that --help stays immediate; a function imports what it needs when it builds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, Sequence[int]]  # name of a tensor -> its shape

RESNET_STAGES = ("layer2", "layer3", "layer4")


@dataclass(frozen=True)
class BackboneEntry:
    """A network, and what the project has to know of it.

    name: the value of --backbone, and the name of the network's ImageNet weights in torchvision.
    build: (norm, dilation) -> the network with random weights. `norm` maps a width to a
        normalisation layer; `dilation` dilates the last stage instead of striding (DC5). Its
        children run one after another; those after the last stage are dropped.
    stages: the children whose outputs are the maps of stride 8, 16 and 32.
    channels: the widths of these maps.
    trains: beginnings of the names of the parameters that train. The others stay as they are,
        unless the network starts from random weights.
    looks_like: whether tensors of these names and shapes are this network's.
    hugging_face: its name in the config.json of a DeformableDetr, which is timm's.
    can_dilate: whether `dilation` is possible.
    fine: the child whose output is the map of stride 4, and its channels; --masks needs it.
    norms_follow_convolutions: whether each norm acts on the output of the convolution that is
        registered before it, and on nothing else. The convolution can then apply a frozen one.
    """

    name: str
    build: Callable[[Callable[[int], nn.Module], bool], nn.Module]
    stages: tuple[str, str, str]
    channels: tuple[int, int, int]
    trains: tuple[str, ...]
    looks_like: Callable[[Shapes], bool]
    hugging_face: str
    can_dilate: bool = True
    fine: tuple[str, int] | None = None
    norms_follow_convolutions: bool = False


def recognise(shapes: Shapes) -> str | None:
    """The name of the network with these tensors; None if there is no such entry."""
    for entry in BACKBONES.values():
        if entry.looks_like(shapes):
            return entry.name
    return None


# ---- ResNets of torchvision


def _resnet(name: str, blocks: Sequence[int], bottleneck: tuple[int, int] | None = None) -> BackboneEntry:
    """A ResNet of basic blocks, which torchvision cannot dilate, or of bottlenecks.

    bottleneck: channels of the first 3x3 convolution, and of one of its groups.
    """
    width = 512 if bottleneck else 128
    return BackboneEntry(
        name=name,
        build=partial(_build_resnet, name),
        stages=RESNET_STAGES,
        channels=(width, 2 * width, 4 * width),
        # conv1 and layer1 stay as they are, as published
        trains=RESNET_STAGES,
        looks_like=partial(_is_resnet, blocks, bottleneck),
        hugging_face=name,
        can_dilate=bottleneck is not None,
        fine=("layer1", width // 2),
        norms_follow_convolutions=True,
    )


def _build_resnet(name: str, norm: Callable[[int], nn.Module], dilation: bool) -> nn.Module:
    import torchvision

    build = getattr(torchvision.models, name)
    return build(weights=None, norm_layer=norm, replace_stride_with_dilation=[False, False, dilation])


def _is_resnet(blocks: Sequence[int], bottleneck: tuple[int, int] | None, shapes: Shapes) -> bool:
    # the number of blocks tells depths apart
    for stage, count in enumerate(blocks, 1):
        found = {match[1] for name in shapes if (match := re.match(rf"layer{stage}\.(\d+)\.", name))}
        if len(found) != count:
            return False

    # only bottlenecks have a third convolution; the second tells wide ones and ResNeXts apart
    if "layer1.0.conv3.weight" not in shapes:
        return bottleneck is None
    return tuple(shapes["layer1.0.conv2.weight"][:2]) == bottleneck


_ENTRIES = (
    _resnet("resnet18", (2, 2, 2, 2)),
    _resnet("resnet34", (3, 4, 6, 3)),
    _resnet("resnet50", (3, 4, 6, 3), (64, 64)),
    _resnet("resnet101", (3, 4, 23, 3), (64, 64)),
    _resnet("resnet152", (3, 8, 36, 3), (64, 64)),
    _resnet("resnext50_32x4d", (3, 4, 6, 3), (128, 4)),
    _resnet("resnext101_32x8d", (3, 4, 23, 3), (256, 8)),
    _resnet("resnext101_64x4d", (3, 4, 23, 3), (256, 4)),
    _resnet("wide_resnet50_2", (3, 4, 6, 3), (128, 128)),
    _resnet("wide_resnet101_2", (3, 4, 23, 3), (128, 128)),
)
BACKBONES = {entry.name: entry for entry in _ENTRIES}
