"""The backbone: a network of `util.backbones` as a source of feature maps.

Shape letters: B images, H x W pixels; level l has C_l channels and stride s_l.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FrozenBatchNorm2d

from util.backbones import BACKBONES
from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.nested_tensor import NestedTensor


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d, which in evaluation the convolution before it may apply.

    By itself it gives the type of the input. torchvision's gives float32 for bfloat16 and float16.
    """

    # whether the convolution before it is a NormedConv2d
    follows_normed = False
    # of this forward, where the network computed those of all its norms
    scale_and_shift: tuple[Tensor, Tensor] | None = None

    @property
    def is_applied(self) -> bool:
        """Whether the convolution applies it. In training it does not: there each rounding is published."""
        return self.follows_normed and not self.training

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.is_applied:
            return x_BCHW
        if x_BCHW.dtype == self.weight.dtype:
            scale, shift = self.scale_and_shift or scales_and_shifts([self])[0]
            return _ScaleAndShift.apply(x_BCHW, scale[:, None, None], shift[:, None, None])
        return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _ScaleAndShift(torch.autograd.Function):
    """torch.addcmul of constants, whose backward multiplies once and not twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(shift, x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class NormedConv2d(nn.Conv2d):
    """A convolution without bias that in evaluation applies the frozen norm behind it.

    Scaling a kernel is cheaper than scaling its output: this saves two passes over every map. The
    norm keeps its place in the network and its names in the state dict.
    """

    norm: tuple[FrozenBatchNorm]  # in a tuple it is no submodule

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the kernel and the bias that the convolution is computed with."""
        return [self.weight.shape, self.norm[0].bias.shape]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.norm[0].is_applied:
            return super().forward(x_BCHW)
        norm = self.norm[0]
        scale, shift = norm.scale_and_shift or scales_and_shifts([norm])[0]
        return self._conv_forward(x_BCHW, self.weight * scale[:, None, None, None], shift)


def scales_and_shifts(norms: Sequence[FrozenBatchNorm]) -> list[tuple[Tensor, Tensor]]:
    """[C], [C] of each norm: its output is its input times the first, plus the second.

    All at once, because a call for each of 53 norms takes longer than its arithmetic.
    """
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (torch.cat([getattr(norm, name) for norm in norms]) for name in names)
    scale = weight * (variance + norms[0].eps).rsqrt()
    channels = [len(norm.weight) for norm in norms]
    return list(zip(scale.split(channels), (bias - mean * scale).split(channels), strict=True))


def apply_norms_in_convolutions(network: nn.Module) -> None:
    """Let every convolution apply the frozen norm that is registered right behind it."""
    for parent in network.modules():
        for layer, norm in itertools.pairwise(parent.children()):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, FrozenBatchNorm):
                # as torch.nn.utils.parametrize does: the parameters stay the same objects
                layer.__class__ = NormedConv2d
                assert isinstance(layer, NormedConv2d)
                layer.norm = (norm,)
                norm.follows_normed = True


# by --backbone_norm
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm,
    "bn": nn.BatchNorm2d,
    "gn": partial(nn.GroupNorm, 32),
}


class Body(nn.Module):
    """The children of a network under their own names, one after another, up to the last stage.

    Args:
        network: what the entry of a backbone builds.
        stages: the children whose outputs are given; the classifier behind the last is dropped.
        channels: C_l of these outputs.
        fine: a child before them whose output, of stride 4, is given too, as the first map.
    """

    def __init__(
        self, network: nn.Module, stages: Sequence[str], channels: Sequence[int], fine: str = ""
    ) -> None:
        super().__init__()
        self._stages, self.channels = tuple(stages), tuple(channels)
        self._wanted = {fine, *stages}
        # under their own names, so that checkpoints fit
        for name, layer in network.named_children():
            self.add_module(name, layer)
            if name == self._stages[-1]:
                break

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> per stage a map [B, C_l, H / s_l, W / s_l]."""
        x = images_B3HW
        # convolutions on a CPU are faster when channels lie beside each other, and all maps follow;
        # training keeps the published order, in which every sum was compared
        layout = (
            torch.channels_last if x.device.type == "cpu" and not self.training else torch.contiguous_format
        )
        x = x.contiguous(memory_format=layout)
        with self._frozen_norms_prepared():
            # no map but those of the stages is kept
            maps = []
            for name, layer in self.named_children():
                x = layer(x)
                if name in self._wanted:
                    maps.append(x)
            return maps

    @contextmanager
    def _frozen_norms_prepared(self) -> Iterator[None]:
        norms = [module for module in self.modules() if isinstance(module, FrozenBatchNorm)]
        for norm, both in zip(norms, scales_and_shifts(norms) if norms else [], strict=True):
            norm.scale_and_shift = both
        try:
            yield
        finally:  # the weights may be others in the next forward
            for norm in norms:
                norm.scale_and_shift = None


class Backbone(nn.Module):
    """Feature maps with their padding masks.

    Args:
        body: the network.
        trains: beginnings of the names of the parameters that train; the others are frozen. `("",)`
            trains all, `()` none.

    Raises:
        ValueError: no parameter has a name that begins so, and all would be frozen.
    """

    def __init__(self, body: Body, trains: Sequence[str]) -> None:
        super().__init__()
        self.body, self.channels = body, body.channels
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(trains)))

        # a detector with a frozen backbone trains without a message, and badly
        if trains and not any(parameter.requires_grad for parameter in body.parameters()):
            raise ValueError(
                f"{type(body).__name__} has no parameter whose name begins with {' or '.join(trains)}, "
                "which are those that train: all would be frozen"
            )

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """B images -> per level a [B, C_l, H / s_l, W / s_l] map with its mask, the fine one first."""
        return [NestedTensor(x, resize_mask(images.mask, x.shape[-2:])) for x in self.body(images.tensors)]


def resize_mask(mask_BHW: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest resize of a bool mask to (height, width)."""
    if torch.compiler.is_exporting():
        return _resize_mask_by_index(mask_BHW, size)
    # as bytes, which need no conversion
    return F.interpolate(mask_BHW[:, None].view(torch.uint8), size=tuple(size)).view(torch.bool)[:, 0]


def _resize_mask_by_index(mask_BHW: Tensor, size: Sequence[int]) -> Tensor:
    """The same to the bit, for exported graphs: runtimes round the places of a resize in other ways."""
    for axis, side in enumerate(size, 1):
        before, after = (
            torch.scalar_tensor(length, dtype=torch.float32, device=mask_BHW.device)
            for length in (mask_BHW.shape[axis], side)
        )
        places = torch.arange(side, dtype=torch.float32, device=mask_BHW.device) * (before / after)
        mask_BHW = mask_BHW.index_select(axis, places.to(torch.int64).clamp(max=mask_BHW.shape[axis] - 1))
    return mask_BHW


def build_body(
    name: str, norm: str, weights: str, *, dilation: bool, multi_scale: bool, fine: bool = False
) -> Body:
    """The network of a backbone, with its weights.

    Args:
        name: a key of BACKBONES.
        norm: a key of NORMS.
        weights: "imagenet" (ImageNet V1), "none", or a file with a state dict of torchvision's
            names.
        dilation: dilate the last stage instead of striding (DC5).
        multi_scale: give the maps of strides 8, 16 and 32 instead of the last alone.
        fine: give the map of stride 4 too, as the first.

    Raises:
        UserError: the weights can't be had or don't fit.
    """
    entry = BACKBONES[name]
    # a single scale is the last stage
    first = 0 if multi_scale else 2
    network = entry.build(NORMS[norm], dilation)
    if entry.norms_follow_convolutions:
        apply_norms_in_convolutions(network)
    body = Body(
        network,
        entry.stages[first:],
        entry.channels[first:],
        entry.fine[0] if fine and entry.fine else "",
    )
    if weights == "imagenet":
        _load(body, _imagenet_weights(name), weights)
    elif weights != "none":
        _load(body, _file_weights(weights), weights)
    return body


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
    # torchvision's files are state dicts; training programs put one into a dict
    return checkpoint.get("state_dict", checkpoint.get("model", checkpoint))


def _load(body: Body, state: dict[str, Tensor], source: str) -> None:
    """Load all but the classifier. Files of frozen statistics have no num_batches_tracked."""
    # a head of classes is in most files, and not in the body
    own = body.state_dict()
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"--backbone_weights {source} does not fit --backbone and --backbone_norm: "
            f"{len(missing)} tensors are missing or of another shape, {missing[0]} first"
        )
    body.load_state_dict(fitting, strict=False)
