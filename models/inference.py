"""What is done once to a detector that will only detect, instead of in every forward."""

from __future__ import annotations

from torch import nn

from models.backbone import FrozenBatchNorm, NormedConv2d, scales_and_shifts
from models.deformable_detr import DeformableDETR
from util.step.precision import LOW_TYPES


def prepare_for_inference(model: DeformableDETR, amp: str) -> None:
    """Change the weights in place to those that evaluation under autocast computes with, to the bit.

    The convolutions take over the frozen norms behind them. With --amp the weights of products are
    rounded now: autocast converts each of them in every forward, which makes two fifths of the calls.
    The model can't be trained afterwards, and its state dict is another.

    Args:
        amp: "off", "bf16" or "fp16".
    """
    model.eval()
    norms = set()
    for layer in model.modules():
        if isinstance(layer, NormedConv2d):
            norms.add(layer.norm[0])
            _take_over(layer, layer.norm[0])
    # or the backbone would compute the scales of all norms in every forward
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in norms:
                setattr(parent, name, nn.Identity())
    if amp == "off":
        return

    # these compute in the type of their weights
    exact = {*model.class_embed.modules(), *model.bbox_embed.modules()}
    if model.mask_head:
        exact |= {*model.mask_head.mask_embed.modules()}
    if not model.transformer.two_stage:
        exact.add(model.transformer.reference_points)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)) and layer not in exact:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(LOW_TYPES[amp])


def _take_over(convolution: NormedConv2d, norm: FrozenBatchNorm) -> None:
    scale, shift = scales_and_shifts([norm])[0]
    convolution.weight.data = convolution.weight.data * scale[:, None, None, None]
    convolution.bias = nn.Parameter(shift)
    convolution.__class__ = nn.Conv2d  # type: ignore[assignment]
    del convolution.norm
