"""The deformable decoder ("Deformable DETR", section 4.2).

Shape letters: B images, Q queries, S tokens of all levels, L levels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from models.dropout import Dropout, ReLUDropout
from models.heads import decode_boxes
from models.ops.modules import MSDeformAttn
from models.token_batch import TokenBatch


@dataclass(frozen=True)
class Queries:
    """The queries of a batch.

    content, position: [B, Q, C]; reference: [B, Q, 2] points or [B, Q, 4] boxes, in [0, 1] of the
    unpadded image.
    """

    content: Tensor
    position: Tensor
    reference: Tensor


class DeformableTransformerDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and feed-forward, each followed by its norm."""

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        dropout: float,
        drop_path: float,
        n_levels: int,
        n_heads: int,
        n_points: int,
    ) -> None:
        super().__init__()
        # the published names count norms and dropouts in this order
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.dropout2 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout3 = ReLUDropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout4 = Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, position: Tensor, reference_BQL: Tensor, memory: TokenBatch) -> Tensor:
        """x, position: [B, Q, C]; reference_BQL: [B, Q, L, 2 or 4] per padded level -> [B, Q, C]."""
        # the position is added to queries and keys, not to values
        query = x + position
        attended, _ = self.self_attn(query, query, x, need_weights=False)
        x = self.norm2(x + self.drop_path(self.dropout2(attended)))

        # the tokens of the image around the reference points
        attended = self.cross_attn(
            x + position,
            reference_BQL,
            memory.tokens,
            memory.spatial_shapes,
            input_padding_mask=memory.padding_mask,
        )
        x = self.norm1(x + self.drop_path(self.dropout1(attended)))
        hidden = self.linear2(self.dropout3(self.linear1(x)))
        return self.norm3(x + self.drop_path(self.dropout4(hidden)))


class DeformableTransformerDecoder(nn.Module):
    """Layers whose queries look at the encoder's tokens around their reference points or boxes."""

    def __init__(self, layers: list[DeformableTransformerDecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, queries: Queries, memory: TokenBatch, box_heads: nn.ModuleList, with_box_refine: bool
    ) -> tuple[Tensor, Tensor]:
        """Of all N layers the queries' contents [N, B, Q, C] and boxes [N, B, Q, 4] (cxcywh in [0, 1]).

        With refinement the detached boxes of a layer are the references of the next ("Deformable
        DETR", appendix A.4).
        """
        x, reference = queries.content, queries.reference
        reference_BQL = _per_level(reference, memory.valid_ratios)
        contents, refined = [], []
        # in two-stage there is one head more, for the proposals
        for layer, box_head in zip(self.layers, box_heads, strict=False):
            x = layer(x, queries.position, reference_BQL, memory)
            contents.append(x)
            if with_box_refine:
                refined.append(decode_boxes(box_head(x), reference))
                reference = refined[-1].detach()
                reference_BQL = _per_level(reference, memory.valid_ratios)
        if with_box_refine:
            return torch.stack(contents), torch.stack(refined)
        # the layers share head and reference
        stacked = torch.stack(contents)
        return stacked, decode_boxes(box_heads[0](stacked), reference)


def _per_level(reference: Tensor, valid_ratios_BL2: Tensor) -> Tensor:
    """References of the unpadded image, as fractions of every padded level: [B, Q, L, 2 or 4]."""
    # width and height of boxes shrink like x and y
    ratios = valid_ratios_BL2.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]
