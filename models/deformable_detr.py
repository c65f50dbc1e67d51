"""The detector: backbone -> projection -> transformer -> heads.

Shape letters: B images, C channels, Q queries, K classes, L levels, S tokens of all levels, E entries
of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone, resize_mask
from models.deformable_transformer import Decoded, DeformableTransformer
from models.segmentation import MaskHead
from util.distributed.exchange import exchanges, largest_of_processes
from util.nested_tensor import NestedTensor
from util.step.precision import widened

# of ImageNet's pixels in [0, 1], which the backbones were trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DeformableDETR(nn.Module):
    """Deformable DETR (Zhu et al., arXiv 2010.04159).

    Args:
        backbone: gives the feature maps.
        position: maps the padding masks of the levels [B, H, W] to a position encoding [B, S, C].
        transformer: encoder and decoder.
        class_heads, box_heads: one per decoder layer (the same module repeated without refinement),
            one more in two-stage.
        num_feature_levels: L; levels beyond the backbone's maps come from strided convolutions.
        num_queries: Q.
        aux_loss: whether outputs of all decoder layers are given.
        with_box_refine: iterative box refinement.
        mask_head: for instance segmentation; the backbone must give the map of stride 4 then.
        frozen: only the mask head trains. All else stays as it is, and computes as in evaluation.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        position: nn.Module,
        transformer: DeformableTransformer,
        class_heads: nn.ModuleList,
        box_heads: nn.ModuleList,
        *,
        num_feature_levels: int,
        num_queries: int,
        aux_loss: bool,
        with_box_refine: bool,
        mask_head: MaskHead | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed = class_heads
        self.bbox_embed = box_heads
        if not transformer.two_stage:
            self.query_embed = nn.Embedding(num_queries, 2 * transformer.d_model)
        self.input_proj = build_projection(backbone.channels, transformer.d_model, num_feature_levels)
        # a container of the two, for their published names
        self.backbone = nn.Sequential(backbone, position)
        self.aux_loss, self.with_box_refine = aux_loss, with_box_refine
        self.mask_head, self.frozen = mask_head, frozen
        if frozen:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("mask_head."))
        # on the device with the model: copying them each step would block
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> DeformableDETR:
        """As in PyTorch, but what is frozen stays in evaluation mode: no dropout, no new statistics."""
        super().train(mode)
        if self.frozen:
            for name, child in self.named_children():
                child.train(mode and name == "mask_head")
        return self

    def forward(self, images: NestedTensor | Sequence[Tensor]) -> dict[str, Any]:
        """Detect.

        Args:
            images: RGB, a NestedTensor or a list of [3, H, W] tensors: uint8, or floats that are
                normalised already.

        Returns:
            pred_logits: [B, Q, K]; pred_boxes: [B, Q, 4] cxcywh in [0, 1] of the unpadded image;
            aux_outputs: the same of the earlier decoder layers; enc_outputs: the same of the
            proposals, [B, S, ...], in two-stage;
            with a mask head also pixel_embed [B, E, H / 4, W / 4], mask_embed [B, Q, E] and image_sizes
            [B, 2] (models/masks.py);
            num_streams: 2 if B counts every image twice (plain, then mixed by BatchFormerV2), else
            1.
        """
        if not isinstance(images, NestedTensor):
            images = NestedTensor.from_images(images)
        if self.transformer.across_processes and self.training and exchanges():
            # one position must be one place in the images of all processes
            images = images.padded_to(*largest_of_processes(images.mask.shape[1:]))
        features = self.backbone[0](self._normalized(images))
        fine = features.pop(0).tensors if self.mask_head else None
        maps, masks = self._project(features, images.mask)
        position = self.backbone[1](masks).to(maps[0].dtype)
        queries = None if self.transformer.two_stage else self.query_embed.weight
        exact = _requiring_gradients(self) if self.frozen and not self.training else nullcontext()
        with exact:
            decoded = self.transformer(
                maps, masks, position, queries, self.class_embed, self.bbox_embed, self.with_box_refine
            )
            out = self._outputs(decoded)
        if self.mask_head and fine is not None:
            sizes = _unpadded_sizes(images.mask).repeat(decoded.memory.num_streams, 1)
            out |= self.mask_head(fine, decoded.memory, decoded.contents[-1], out["pred_boxes"], sizes)
            out["image_sizes"] = sizes
        return out

    def _normalized(self, images: NestedTensor) -> NestedTensor:
        """Bytes normalised, with zeros on padding, to the same bits as torchvision's transforms."""
        if images.tensors.dtype != torch.uint8:
            return images
        pixels = images.tensors.to(self.pixel_mean.dtype).mul_(1 / 255)
        pixels.sub_(self.pixel_mean).div_(self.pixel_std)
        return NestedTensor(pixels.masked_fill_(images.mask[:, None], 0.0), images.mask)

    def _project(self, features: list[NestedTensor], mask_BHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The L maps [B, C, H, W] at the transformer's width, and their masks [B, H, W].

        Args:
            mask_BHW: of the images.
        """
        maps = [project(feature.tensors) for project, feature in zip(self.input_proj, features, strict=False)]
        masks = [feature.mask for feature in features]

        # the levels beyond the backbone's maps
        source = features[-1].tensors
        for project in self.input_proj[len(features) :]:
            source = project(source)
            maps.append(source)
            masks.append(resize_mask(mask_BHW, source.shape[-2:]))
        # float32 under autocast, as GroupNorm gives them on a GPU: the residual sums begin here
        return [widened(x) for x in maps], masks

    def _outputs(self, decoded: Decoded) -> dict[str, Any]:
        if self.with_box_refine:
            # in two-stage there is one head more, for the proposals
            heads = zip(self.class_embed, decoded.contents, strict=False)
            logits = torch.stack([head(content) for head, content in heads])
        else:  # the layers share a head
            logits = self.class_embed[0](decoded.contents)
        both = zip(logits, decoded.boxes, strict=True)
        layers = [{"pred_logits": some, "pred_boxes": boxes} for some, boxes in both]
        out: dict[str, Any] = {**layers[-1], "num_streams": decoded.memory.num_streams}
        if self.aux_loss:
            out["aux_outputs"] = layers[:-1]
        if decoded.proposals:
            boxes = decoded.proposals.box_logits.sigmoid()
            out["enc_outputs"] = {"pred_logits": decoded.proposals.logits, "pred_boxes": boxes}
        return out


@contextmanager
def _requiring_gradients(model: nn.Module) -> Iterator[None]:
    """A block in which all weights require a gradient, as those of a detector that is not frozen.

    PyTorch asks for it before it multiplies in evaluation too (whether it folds the dimensions of a
    batch), and so the last bit of a box would be another.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _unpadded_sizes(mask_BHW: Tensor) -> Tensor:
    """[B, 2]: height and width of the images without their padding, which lies right and below."""
    return torch.stack([(~mask_BHW[:, :, 0]).sum(1), (~mask_BHW[:, 0]).sum(1)], 1)


def build_projection(channels: Sequence[int], hidden_dim: int, num_levels: int) -> nn.ModuleList:
    """Per level a convolution with GroupNorm(32).

    They are 1x1 for the backbone's maps, and 3x3 of stride 2 for the levels beyond.
    """
    projections = nn.ModuleList()
    for level in range(num_levels):
        if level < len(channels):
            convolution = nn.Conv2d(channels[level], hidden_dim, kernel_size=1)
        else:
            # the first level beyond is made from the backbone's last map, the next from the level before
            width = channels[-1] if level == len(channels) else hidden_dim
            convolution = nn.Conv2d(width, hidden_dim, kernel_size=3, stride=2, padding=1)
        nn.init.xavier_uniform_(convolution.weight)
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        projections.append(nn.Sequential(convolution, nn.GroupNorm(32, hidden_dim)))
    return projections
