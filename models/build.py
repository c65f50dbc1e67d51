"""The only place that maps a Config to modules."""

from __future__ import annotations

from torch import nn

from models.backbone import Backbone, ResNetBody, build_resnet
from models.batchformer import OFF, BatchFormerV2, build_modules
from models.criterion import SetCriterion
from models.deformable_detr import DeformableDETR
from models.deformable_transformer import DeformableTransformer
from models.heads import build_heads
from models.matcher import HungarianMatcher
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.postprocess import PostProcess
from util.config import LEARNED_POSITIONS, BackboneConfig, Config


def build_model(config: Config) -> tuple[DeformableDETR, SetCriterion, dict[str, PostProcess]]:
    """The detector, its losses, and {"bbox": postprocessor}.

    Raises:
        UserError: the backbone's weights can't be had or don't fit.
    """
    transformer = config.transformer
    class_heads, box_heads = build_heads(
        transformer.hidden_dim,
        config.data.num_logits,
        transformer.dec_layers,
        transformer.with_box_refine,
        transformer.two_stage,
    )
    model = DeformableDETR(
        build_backbone(config),
        build_position(config.backbone, transformer.hidden_dim),
        build_transformer(config),
        class_heads,
        box_heads,
        num_feature_levels=config.backbone.num_feature_levels,
        num_queries=transformer.num_queries,
        aux_loss=not config.loss.no_aux_loss,
        with_box_refine=transformer.with_box_refine,
    )
    return model, build_criterion(config), {"bbox": PostProcess()}


def build_backbone(config: Config) -> Backbone:
    backbone = config.backbone
    # a checkpoint replaces the backbone's weights: fetching others first would be for nothing
    weights = "none" if config.run.resume or config.run.finetune else backbone.backbone_weights
    resnet = build_resnet(backbone.backbone, backbone.backbone_norm, weights, backbone.dilation)
    starts_random = backbone.backbone_weights == "none" and backbone.backbone_norm != "frozen_bn"
    return Backbone(
        ResNetBody(resnet, multi_scale=backbone.num_feature_levels > 1),
        train_layers=config.optim.lr_backbone > 0,
        freeze_stem=not starts_random,
    )


def build_position(backbone: BackboneConfig, hidden_dim: int) -> nn.Module:
    if backbone.position_embedding == "learned":
        return PositionEmbeddingLearned(hidden_dim // 2, LEARNED_POSITIONS)
    return PositionEmbeddingSine(hidden_dim // 2, scale=backbone.position_embedding_scale)


def build_transformer(config: Config) -> DeformableTransformer:
    transformer, bf = config.transformer, config.batchformer
    modules = None
    if bf.bf != OFF:
        modules = build_modules(
            transformer.hidden_dim, transformer.enc_layers, bf.insert_idx, shared=bool(bf.share_bf), num_layers=bf.bt_num_layers
        )
    return DeformableTransformer(
        d_model=transformer.hidden_dim,
        nhead=transformer.nheads,
        num_encoder_layers=transformer.enc_layers,
        num_decoder_layers=transformer.dec_layers,
        dim_feedforward=transformer.dim_feedforward,
        dropout=transformer.dropout,
        drop_path=transformer.drop_path,
        num_feature_levels=config.backbone.num_feature_levels,
        enc_n_points=transformer.enc_n_points,
        dec_n_points=transformer.dec_n_points,
        batchformer_modules=modules,
        batchformer=BatchFormerV2(modules, bf.bf, bf.insert_idx, bf.eval_bf) if modules else None,
        two_stage=transformer.two_stage,
        num_proposals=transformer.num_queries,
        checkpoint_encoder=transformer.checkpoint_encoder,
    )


def build_criterion(config: Config) -> SetCriterion:
    loss = config.loss
    matcher = HungarianMatcher(loss.set_cost_class, loss.set_cost_bbox, loss.set_cost_giou, loss.focal_alpha)
    return SetCriterion(
        matcher,
        {"loss_ce": loss.cls_loss_coef, "loss_bbox": loss.bbox_loss_coef, "loss_giou": loss.giou_loss_coef},
        num_aux_outputs=0 if loss.no_aux_loss else config.transformer.dec_layers - 1,
        with_proposals=config.transformer.two_stage,
        focal_alpha=loss.focal_alpha,
    )
