"""Masks from embeddings: their losses, and the masks of detections on the original images.

Shape letters: B images of all streams, N images, Q queries, E entries of an embedding, n masks of an
image, T masks of all images, h x w cells of STRIDE x STRIDE pixels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from util.step.precision import full_precision, widened

STRIDE = 4  # pixels of an image in a row of a cell
# of masks that are computed at once for an image: 64 MiB in float32
MOST_PIXELS = 2**24


def mask_losses(
    pixel_embed: Tensor,
    mask_embed: Tensor,
    targets: Sequence[Tensor],
    counts: Sequence[int],
    query_T: Tensor,
    target_T: Tensor,
) -> dict[str, Tensor]:
    """Focal and dice loss of the matched queries ("DETR", appendix on segmentation), summed over them.

    Args:
        pixel_embed, mask_embed: [B, E, h, w] and [B, Q, E] of the mask head.
        targets: per image [n, H, W] bool, of the N images of one stream.
        counts: number of targets of each of the B images.
        query_T, target_T: the pairs, image after image: indices into [B, Q] and into the targets of the
            B images.

    Returns:
        loss_mask: the mean over cells of the focal loss with alpha 0.25 and gamma 2; loss_dice.
    """
    pixels, queries = widened(pixel_embed), widened(mask_embed)
    # of an image with more targets than queries some have no pair
    pairs = [min(count, queries.shape[1]) for count in counts]
    chosen = queries.flatten(0, 1)[query_T].split(pairs)
    with full_precision(pixels.device):
        logits_Thw = torch.cat([_products(some, image) for some, image in zip(chosen, pixels, strict=True)])
    cells = torch.cat([cells_of(masks, pixels.shape[-2:], logits_Thw.dtype) for masks in targets])
    # the targets of one stream are those of the other
    wanted_Thw = cells[target_T % max(len(cells), 1)]
    focal = sigmoid_focal_loss(logits_Thw, wanted_Thw, alpha=0.25, gamma=2)
    return {"loss_mask": focal.mean((1, 2)).sum(), "loss_dice": dice_loss(logits_Thw, wanted_Thw).sum()}


def dice_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 - (2 |A B| + 1) / (|A| + |B| + 1) of the probabilities A ("V-Net", eq. 3): [T, h, w] -> [T]."""
    probability = logits.sigmoid()
    both, sizes = (probability * wanted).sum((1, 2)), (probability + wanted).sum((1, 2))
    return 1 - (2 * both + 1) / (sizes + 1)


def cells_of(masks: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Masks [n, H, W] bool -> [n, h, w]: how much of each cell is in the mask, from 0 to 1.

    A part and not a decision: so even an object thinner than a cell is wanted somewhere, and borders
    lie where they are. Cells beyond the image are 0.
    """
    right, below = (-side % STRIDE for side in (masks.shape[2], masks.shape[1]))
    cells = F.avg_pool2d(F.pad(masks[:, None].to(dtype), (0, right, 0, below)), STRIDE)[:, 0]
    return F.pad(cells, (0, shape[1] - cells.shape[2], 0, shape[0] - cells.shape[1]))


def _products(queries_nE: Tensor, pixels_Ehw: Tensor) -> Tensor:
    return (queries_nE @ pixels_Ehw.flatten(1)).unflatten(1, pixels_Ehw.shape[1:])


@dataclass(frozen=True)
class ImageMasks:
    """The masks of an image's n detections, which are computed when they are asked for.

    mask_embed: [n, E]; pixel_embed: [E, h, w] of the padded image; image_size: [2] height and width of
    the image in it, in pixels of the network; target_size: [2] those of the masks, in pixels.
    """

    mask_embed: Tensor
    pixel_embed: Tensor
    image_size: Tensor
    target_size: Tensor

    def __len__(self) -> int:
        return len(self.mask_embed)

    def __getitem__(self, indices: Tensor) -> ImageMasks:
        return replace(self, mask_embed=self.mask_embed[indices])

    def cpu(self) -> ImageMasks:
        """A copy on the host, without the padding."""
        pixels = self._unpadded().cpu().clone()
        return ImageMasks(
            widened(self.mask_embed).cpu(), pixels, self.image_size.cpu(), self.target_size.cpu()
        )

    def _unpadded(self) -> Tensor:
        """The cells of the image, [E, h, w] in float32 or float64."""
        height, width = (-(-side // STRIDE) for side in self.image_size.tolist())
        return widened(self.pixel_embed[:, :height, :width])

    def chunks(self) -> Iterator[Tensor]:
        """The masks in their order, a few at a time: bool [some, H, W] on the host.

        A column lies beside the next in memory, as COCO's run lengths go through a mask.
        """
        for logits_nWH in self._logits():
            yield (logits_nWH > 0).cpu().transpose(1, 2)

    def logits(self) -> Iterator[Tensor]:
        """The logits of each mask, [H, W] on the device of the network; a few are computed at once."""
        for logits_nWH in self._logits():
            yield from logits_nWH.transpose(1, 2)

    def _logits(self) -> Iterator[Tensor]:
        if not len(self):
            return
        (height, width), target = self.image_size.tolist(), self.target_size.tolist()
        cells = self._unpadded()
        most = max(MOST_PIXELS // max(target[0] * target[1], 1), 1)
        scale = [STRIDE * to / side for to, side in zip(target, (height, width), strict=True)]
        with full_precision(cells.device):
            pixels_Ewh = cells.transpose(1, 2).contiguous()
            for some in widened(self.mask_embed).split(most):
                yield _enlarged(_products(some, pixels_Ewh), scale[::-1], target[::-1])

    def all(self) -> Tensor:
        """All masks, bool [n, H, W] on the host."""
        height, width = self.target_size.tolist()
        masks = torch.empty(len(self), height, width, dtype=torch.bool)
        start = 0
        for some in self.chunks():
            masks[start : start + len(some)] = some
            start += len(some)
        return masks


def _enlarged(logits_nhw: Tensor, scale: Sequence[float], size: Sequence[int]) -> Tensor:
    """[n, h, w] by bilinear interpolation to `size`, where a cell becomes `scale` pixels long.

    The image may end within the last cells: scale * h may be more than the size.
    """
    # a cell more at the end, or rounding could make the result a pixel too small
    padded = F.pad(logits_nhw, (0, 1, 0, 1), mode="replicate")[None]
    larger = F.interpolate(padded, scale_factor=tuple(scale), mode="bilinear", align_corners=False)[0]
    return larger[:, : size[0], : size[1]]
