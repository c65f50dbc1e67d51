"""The head of instance segmentation, after MaskFormer (Cheng et al., arXiv 2107.06278).

Taken from its section 3: a mask is the product of a query's mask embedding and the embeddings of the
pixels, so all masks are one matrix product; the mask embedding comes from a three-layer MLP. The map of
the pixels is made as its pixel decoder makes it (section 3.4), from what there is here: the encoder's
levels and the backbone's first stage are summed upwards, from coarse to fine.

Ours is that a mask begins as the ellipse in its box. With iterative refinement a query learns where its box
is relative to a reference point, so nothing but the box says where in the image the object is.

No mask is computed here: losses and results compute those that they need (models/masks.py).

Shape letters: B images of all streams, N images, Q queries, S tokens of all levels, C channels of the
transformer, E entries of an embedding, H x W pixels of the padded images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import MLP
from models.masks import STRIDE
from models.token_batch import TokenBatch, pixel_centres
from util.step.precision import widened

GROUPS = 8  # of the norms: even a map of one pixel has several values in a group
HEIGHT = 4.0  # the logit of a mask in the middle of its box, before the network has learnt anything


class MaskHead(nn.Module):
    """Embeddings of the pixels and of the queries.

    Args:
        fine_channels: of the backbone's map of stride 4.
        hidden_dim: C. E is half of it, which halves the costs at stride 4, the largest of the head, and 5
            more.
        num_levels: of the encoder.
    """

    def __init__(self, fine_channels: int, hidden_dim: int, num_levels: int) -> None:
        super().__init__()
        width = hidden_dim // 2
        self.level_proj = nn.ModuleList(_normed(hidden_dim, width, kernel=1) for _ in range(num_levels))
        self.fine_proj = _normed(fine_channels, width, kernel=1)
        # one behind each sum, in the order of the levels: the first is of stride 4
        self.smooth = nn.ModuleList(_normed(width, width, kernel=3) for _ in range(num_levels))
        self.pixel_embed = nn.Conv2d(width, width, kernel_size=1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, width, 3)

    def forward(
        self, fine: Tensor, memory: TokenBatch, contents_BQC: Tensor, boxes_BQ4: Tensor, sizes_B2: Tensor
    ) -> dict[str, Tensor]:
        """Embed.

        Args:
            fine: the backbone's map of stride 4, [N, fine_channels, H / 4, W / 4], of one stream.
            memory: the encoder's output.
            contents_BQC: the queries of the last decoder layer.
            boxes_BQ4: their boxes, cxcywh in [0, 1] of the unpadded images. No gradient goes to them.
            sizes_B2: height and width of the unpadded images, in pixels.

        Returns:
            pixel_embed: [B, E, H / 4, W / 4]; mask_embed: [B, Q, E]; the last 5 of the E entries are
            those of `ellipses`.
        """
        levels = [project(x) for project, x in zip(self.level_proj, _maps(memory), strict=True)]
        # both streams have the same images
        levels.insert(0, self.fine_proj(fine).repeat(memory.num_streams, 1, 1, 1))
        x = widened(levels.pop())
        for finer, smooth in zip(reversed(levels), reversed(self.smooth), strict=True):
            # sums in float32 under autocast too
            upsampled = F.interpolate(x, finer.shape[-2:], mode="bilinear", align_corners=False)
            x = widened(F.relu(smooth(upsampled + finer)))
        # float32 under autocast: a small box has large entries
        pixels, queries = ellipses(widened(boxes_BQ4.detach()), sizes_B2, x.shape[-2:])
        return {
            "pixel_embed": torch.cat([widened(self.pixel_embed(x)), pixels], 1),
            "mask_embed": torch.cat([widened(self.mask_embed(contents_BQC)), queries], 2),
        }


def ellipses(boxes_BQ4: Tensor, sizes_B2: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The ellipse of each box as a product of embeddings, which is HEIGHT * (1 - u^2 - v^2).

    u and v are -1 and 1 at the sides of the box: the ellipse is 0, HEIGHT in its middle, and far below 0
    beyond the box. As u is linear in x, u^2 is a product of (x^2, x, 1) and what the box says.

    Args:
        boxes_BQ4: cxcywh in [0, 1] of the unpadded images.
        sizes_B2: height and width of the unpadded images, in pixels.
        shape: h, w of the map of the pixels.

    Returns:
        of the pixels [B, 5, h, w] and of the boxes [B, Q, 5].
    """
    # the middles of the cells, in [0, 1] of the unpadded image, [B, h * w]
    height, width = (side[:, None] for side in sizes_B2.to(boxes_BQ4.dtype).unbind(1))
    columns, rows = (pixel_centres([(shape[0], shape[1])], width.device) * STRIDE).unbind(1)
    x, y = columns / width, rows / height
    pixels = torch.stack([x * x, x, y * y, y, torch.ones_like(x)], 1).unflatten(2, tuple(shape))

    # 1 - ((x - cx) / a)^2 - ((y - cy) / b)^2; a box of no size would be none
    cx, cy, w, h = boxes_BQ4.unbind(-1)
    per_a = torch.maximum(w / 2, STRIDE / width) ** -2
    per_b = torch.maximum(h / 2, STRIDE / height) ** -2
    inside = 1 - cx**2 * per_a - cy**2 * per_b
    queries = torch.stack([-per_a, 2 * cx * per_a, -per_b, 2 * cy * per_b, inside], -1)
    return pixels, HEIGHT * queries


def _maps(memory: TokenBatch) -> list[Tensor]:
    """The tokens as a map [B, C, h, w] of each level, the finest first."""
    sizes = [height * width for height, width in memory.spatial_shapes]
    levels = zip(memory.tokens.split(sizes, 1), memory.spatial_shapes, strict=True)
    return [tokens.transpose(1, 2).unflatten(2, shape) for tokens, shape in levels]


def _normed(channels: int, width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, width))


def build_mask_head(fine_channels: int, hidden_dim: int, num_levels: int) -> MaskHead:
    """The head. The global random generator stays as it is: all other weights begin as without it."""
    with torch.random.fork_rng(devices=[]):
        return MaskHead(fine_channels, hidden_dim, num_levels)
