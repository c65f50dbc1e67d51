"""From the detector's outputs to boxes and masks on the original images. B images, Q queries, K classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from models.masks import ImageMasks

MAX_DETECTIONS = 100  # of an image, as COCO's metrics count them


class PostProcess(nn.Module):
    """The best (query, class) pairs of every image as detections."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], target_sizes: Tensor) -> list[dict[str, Any]]:
        """Detections of the plain stream.

        Args:
            outputs: the detector's, `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4].
            target_sizes: [B, 2] height and width of the images to put the boxes on, in pixels.

        Returns:
            per image `scores` [n], `labels` [n], `boxes` [n, 4] x0, y0, x1, y1 in pixels, and
            `queries` [n], the queries that gave them; best first; n = min(100, Q * K). With a mask head
            also `masks`: an ImageMasks, which has not computed any yet.

        Raises:
            ValueError: the number of sizes is not that of the images.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(
                f"target_sizes must be [{len(logits)}, 2] (height, width), got {list(target_sizes.shape)}"
            )

        results = best_detections(logits, boxes, target_sizes)
        query = results["queries"]
        images: list[dict[str, Any]] = []
        for i in range(len(logits)):
            images.append({name: values[i] for name, values in results.items()})
        if "mask_embed" in outputs:
            chosen = (outputs["mask_embed"][i, query[i]] for i in range(len(logits)))
            parts = zip(chosen, outputs["pixel_embed"], outputs["image_sizes"], target_sizes, strict=True)
            for image, of_image in zip(images, parts, strict=True):
                image["masks"] = ImageMasks(*of_image)
        return images


def best_detections(logits: Tensor, boxes: Tensor, target_sizes: Tensor) -> dict[str, Tensor]:
    """As `PostProcess`, for all images at once: scores, labels, queries [B, n] and boxes [B, n, 4]."""
    # a query may be among the best with several classes
    num_classes = logits.shape[-1]
    scores, best = logits.sigmoid().flatten(1).topk(min(MAX_DETECTIONS, logits[0].numel()), dim=1)
    query, labels = best // num_classes, best % num_classes

    # their boxes in pixels
    height, width = target_sizes.unbind(1)
    scale = torch.stack([width, height, width, height], 1).to(boxes.dtype)
    corners = box_convert(boxes, "cxcywh", "xyxy").gather(1, query[..., None].expand(-1, -1, 4))
    return {"scores": scores, "labels": labels, "boxes": corners * scale[:, None], "queries": query}
