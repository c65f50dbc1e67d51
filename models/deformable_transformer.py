"""From feature maps to decoded queries.

Shape letters: B images, S tokens of all levels, L levels, Q queries, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.batchformer import BatchFormerV2
from models.decoder import DeformableTransformerDecoder, DeformableTransformerDecoderLayer, Queries
from models.encoder import DeformableTransformerEncoder, DeformableTransformerEncoderLayer, drop_path_rates
from models.ops.modules import MSDeformAttn
from models.position_encoding import sine_features, wavelengths
from models.token_batch import (
    TokenBatch,
    encoder_reference_points,
    per_token,
    pixel_centres,
    valid_extents,
    valid_ratios,
)
from util.errors import UserError
from util.step.precision import full_precision, widened

PROPOSAL_SIZE = 0.05  # side of a proposal on the finest level; it doubles with every level


@dataclass(frozen=True)
class Proposals:
    """The encoder's own detections: logits [B, S, K] and boxes before the sigmoid [B, S, 4]."""

    logits: Tensor
    box_logits: Tensor


@dataclass(frozen=True)
class Decoded:
    """What the transformer gives; B counts the images of all streams.

    contents: [N, B, Q, C] of the N decoder layers; boxes: [N, B, Q, 4] cxcywh in [0, 1]; proposals:
    in two-stage; memory: the encoder's output.
    """

    contents: Tensor
    boxes: Tensor
    proposals: Proposals | None
    memory: TokenBatch


class DeformableTransformer(nn.Module):
    """Encoder, queries or proposals, decoder ("Deformable DETR", sections 4.2 and 4.3).

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, drop_path,
        num_feature_levels, enc_n_points, dec_n_points: the sizes.
        batchformer_modules: the weights of BatchFormerV2, registered as `bf`; None without it.
        batchformer: what acts after the encoder's layers with those weights.
        two_stage: take the queries from the encoder's proposals.
        num_proposals: number of these queries.
        checkpoint_encoder: compute the encoder's activations again in the backward instead of
            keeping them.
    """

    proposal_wavelengths: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int,
        dropout: float,
        drop_path: float,
        num_feature_levels: int,
        enc_n_points: int,
        dec_n_points: int,
        batchformer_modules: nn.Module | None,
        batchformer: BatchFormerV2 | None,
        two_stage: bool,
        num_proposals: int,
        checkpoint_encoder: bool,
    ) -> None:
        super().__init__()
        self.d_model, self.two_stage, self.num_proposals = d_model, two_stage, num_proposals
        # the weights of BatchFormerV2 under their published name
        self.bf = batchformer_modules
        self.across_processes = batchformer is not None and batchformer.across_processes
        sizes = {"n_levels": num_feature_levels, "n_heads": nhead}
        self.encoder = DeformableTransformerEncoder(
            [
                DeformableTransformerEncoderLayer(
                    d_model, dim_feedforward, dropout, rate, n_points=enc_n_points, **sizes
                )
                for rate in drop_path_rates(drop_path, num_encoder_layers)
            ],
            after_layer=batchformer or _unchanged,
            recompute=checkpoint_encoder,
        )
        self.decoder = DeformableTransformerDecoder(
            [
                DeformableTransformerDecoderLayer(
                    d_model, dim_feedforward, dropout, rate, n_points=dec_n_points, **sizes
                )
                for rate in drop_path_rates(drop_path, num_decoder_layers)
            ]
        )

        # what tokens and queries begin with
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            # C / 2 features for each of the four coordinates
            self.register_buffer("proposal_wavelengths", wavelengths(d_model // 2), persistent=False)
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            # BatchFormerV2's have their values already
            if parameter.dim() > 1 and not name.startswith("bf."):
                nn.init.xavier_uniform_(parameter)
        # these layers have initial values of their own
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def forward(
        self,
        maps: list[Tensor],
        masks: list[Tensor],
        position: Tensor,
        query_embed: Tensor | None,
        class_heads: nn.ModuleList,
        box_heads: nn.ModuleList,
        with_box_refine: bool,
    ) -> Decoded:
        """Encode and decode.

        Args:
            maps, masks: per level [B, C, H, W], and [B, H, W] bool, True on padding; position: [B,
                S, C].
            query_embed: [Q, 2C] learned positions and contents; None in two-stage.
            class_heads, box_heads: the heads; the decoder uses the box heads, the proposals the
                last of each.
            with_box_refine: refine the boxes from layer to layer.

        Raises:
            UserError: two-stage is to choose more queries than there are proposals.
        """
        # BatchFormerV2 may double the batch within the encoder
        memory = self.encoder(self._flatten(maps, masks, position))
        proposals = None
        if self.two_stage:
            proposals = self._propose(memory, class_heads[-1], box_heads[-1])
        if proposals:
            queries = self._queries_of(proposals)
        else:
            assert query_embed is not None
            queries = self._learned_queries(query_embed, memory.tokens.shape[0])
        contents, boxes = self.decoder(queries, memory, box_heads, with_box_refine)
        return Decoded(contents, boxes, proposals, memory)

    def _flatten(self, maps: list[Tensor], masks: list[Tensor], position: Tensor) -> TokenBatch:
        """All levels in one sequence, the finest first."""
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
        padding_mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        ratios = valid_ratios(padding_mask, shapes)
        return TokenBatch(
            # row after row
            tokens=torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1),
            # the level is a part of the position
            position=position + per_token(self.level_embed[None], shapes),
            padding_mask=padding_mask,
            valid_ratios=ratios,
            reference_points=encoder_reference_points(shapes, ratios),
            spatial_shapes=shapes,
        )

    def _learned_queries(self, query_embed: Tensor, batch: int) -> Queries:
        # learned, and the same for every image
        position, content = query_embed.expand(batch, -1, -1).split(self.d_model, -1)
        # a point in bfloat16 would be wrong by pixels
        with full_precision(position.device):
            return Queries(content, position, self.reference_points(position).sigmoid())

    def _propose(self, memory: TokenBatch, class_head: nn.Module, box_head: nn.Module) -> Proposals:
        """A proposal from every token ("Deformable DETR", appendix A.4, two-stage)."""
        # a token that is padding or at the border gives none
        anchors, invalid = _anchors(memory)
        tokens = memory.tokens.masked_fill(invalid, 0.0)
        tokens = self.enc_output_norm(widened(self.enc_output(tokens)))
        # an infinite logit makes the box (1, 1, 1, 1) whatever the head's output
        box_logits = torch.logit(anchors).masked_fill(invalid, float("inf"))
        return Proposals(class_head(tokens), box_head(tokens) + box_logits)

    def _queries_of(self, proposals: Proposals) -> Queries:
        """The queries of the best proposals, without gradient."""
        tokens = proposals.logits.shape[1]
        if self.num_proposals > tokens:
            raise UserError(
                f"--num_queries {self.num_proposals} is more than the {tokens} proposals that "
                f"--two_stage makes of images this "
                "small; lower --num_queries, or raise --train_sizes and --eval_size"
            )

        # class 0 is their only class in the loss
        best = proposals.logits[..., 0].topk(self.num_proposals, dim=1).indices
        box_logits = proposals.box_logits.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        boxes = box_logits.sigmoid()

        features = sine_features(boxes * 2 * torch.pi, self.proposal_wavelengths).flatten(-2)
        position, content = self.pos_trans_norm(widened(self.pos_trans(features))).split(self.d_model, -1)
        return Queries(content, position, boxes)


def _anchors(memory: TokenBatch) -> tuple[Tensor, Tensor]:
    """A square around the centre of every token.

    Returns:
        boxes [B, S, 4] cxcywh, and [B, S, 1] True where the square can't be used: on padding, or
        nearer than 0.01 to the border.
    """
    shapes, device = memory.spatial_shapes, memory.padding_mask.device
    # in [0, 1] of the unpadded image
    extents_BL2 = valid_extents(memory.padding_mask, shapes)
    centres_BS2 = pixel_centres(shapes, device) / per_token(extents_BL2, shapes)
    sides_L = PROPOSAL_SIZE * 2.0 ** torch.arange(len(shapes), device=device)
    sides_S1 = per_token(sides_L[None, :, None], shapes)[0]
    anchors_BS4 = torch.cat([centres_BS2, sides_S1.expand_as(centres_BS2)], -1)
    # beyond these bounds the logits grow without end
    inside = ((anchors_BS4 > 0.01) & (anchors_BS4 < 0.99)).all(-1, keepdim=True)
    return anchors_BS4, ~inside | memory.padding_mask[..., None]


def _unchanged(layer: int, batch: TokenBatch) -> TokenBatch:
    return batch
