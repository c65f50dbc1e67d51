"""The detector as one graph from bytes to boxes, for torch.export and ONNX.

Shape letters: B images of H x W pixels with their padding, N detections of an image, Q queries, K classes,
E entries of an embedding.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import fuse_conv_bn_eval

from models.deformable_detr import DeformableDETR
from models.export.sampling import attend_by_gathers
from models.inference import prepare_for_inference
from models.ops.modules import MSDeformAttn
from models.postprocess import best_detections
from util.nested_tensor import NestedTensor
from util.step.precision import LOW_TYPES, autocast

INPUTS = ("images", "sizes")
# Any that two-stage can take its queries from: nothing is computed at this size.
EXAMPLE = (2, 3, 1024, 1280)


class DetectorGraph(nn.Module):
    """What is exported: bytes of padded images and their sizes to detections.

    Args:
        model: on the CPU, in evaluation mode; left as it is.
        raw: give what the network gives, instead of the best detections.
        amp: precision of products, as of --amp.
    """

    def __init__(self, model: DeformableDETR, raw: bool, amp: str) -> None:
        super().__init__()
        self.model, self.raw, self.amp = _prepared(model, amp), raw, amp

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` gives, in its order."""
        masks = self.model.mask_head is not None
        if self.raw:
            return ("logits", "boxes", *(("pixel_embed", "mask_embed") if masks else ()))
        return ("scores", "labels", "boxes", "queries", *(("masks",) if masks else ()))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: [B, 3, H, W] uint8 RGB; padding lies right and below, and may hold any bytes.
            sizes: [B, 2] int64 height and width of each image without its padding.

        Returns:
            scores [B, N] float32, best first; labels [B, N] int64 places among the logits; boxes [B, N,
            4] float32 x0, y0, x1, y1 in pixels of the unpadded image; queries [B, N] int64; with a mask
            head masks [B, N, H / 4, W / 4] float32: above 0 is the object, and a cell is 4 x 4 pixels.
            Raw: logits [B, Q, K]; boxes [B, Q, 4] cxcywh in [0, 1] of the unpadded image; with a mask
            head pixel_embed [B, E, H / 4, W / 4] and mask_embed [B, Q, E].
        """
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
        height, width = sizes[:, :, None, None].unbind(1)
        mask_BHW = (rows[:, None] >= height) | (columns >= width)
        with autocast(self.amp, images.device):
            out = self.model(NestedTensor(images, mask_BHW))
        logits, boxes = out["pred_logits"].float(), out["pred_boxes"].float()
        masks = (
            [] if self.model.mask_head is None else [out["pixel_embed"].float(), out["mask_embed"].float()]
        )
        if self.raw:
            return (logits, boxes, *masks)

        found = best_detections(logits, boxes, sizes)
        if masks:
            pixels, queries = masks
            chosen = queries.gather(1, found["queries"][..., None].expand(-1, -1, queries.shape[-1]))
            found["masks"] = (chosen @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        return tuple(found[name] for name in self.outputs)


def _prepared(model: DeformableDETR, amp: str) -> DeformableDETR:
    """A copy for inference, whose norms compute in the type of the convolutions before them.

    Convolutions take over batch norms: ONNX's optimizer would, and mixes types. Group norms get
    parameters of their input's type, as ONNX demands.
    """
    copied = copy.deepcopy(model)
    for parent in copied.modules():
        for (name, layer), (behind, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, behind, nn.Identity())
    prepare_for_inference(copied, amp)
    if amp != "off":
        for layer in copied.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.to(LOW_TYPES[amp])
    return copied


@torch.no_grad()
def trace(graph: DetectorGraph) -> ExportedProgram:
    """The graph with any number of images, and of any height and width.

    Its layers have another operator meanwhile.
    """
    layers = [module for module in graph.modules() if isinstance(module, MSDeformAttn)]
    fast, size = torch.backends.mha.get_fastpath_enabled(), Dim.DYNAMIC
    example = torch.zeros(EXAMPLE, dtype=torch.uint8), torch.tensor([EXAMPLE[2:]] * EXAMPLE[0])
    try:
        for layer in layers:
            layer.operator = attend_by_gathers
        # a fused operator of PyTorch's own, which other runtimes lack
        torch.backends.mha.set_fastpath_enabled(False)
        program = torch.export.export(
            graph.eval(),
            example,
            dynamic_shapes=({0: size, 2: size, 3: size}, {0: size}),
            strict=False,
            # such as that there are enough tokens for the queries of two-stage
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        # the conversions of autocast become a part of the graph
        return program if graph.amp == "off" else program.run_decompositions({})
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for layer in layers:
            del layer.operator
