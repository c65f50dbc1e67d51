"""The only place that maps a Config, or a checkpoint, to modules.

A training step:

    model, criterion, postprocessors = build_model(config, dataset.classes)
    losses = criterion(model(images), targets)  # images: a list of [3, H, W]; targets: of the dataset
    criterion.total(losses).backward()  # the sum weighted by criterion.weight_dict
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

from torch import nn

from models.backbone import Backbone, build_body
from models.batchformer import OFF, BatchFormerV2, build_modules
from models.criterion import MASK_WEIGHT_FLAGS, WEIGHT_FLAGS, SetCriterion
from models.deformable_detr import DeformableDETR
from models.deformable_transformer import DeformableTransformer
from models.heads import build_heads
from models.matcher import HungarianMatcher
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.postprocess import PostProcess
from models.segmentation import MaskHead, build_mask_head
from models.weights.architecture import Purpose, adopt, as_given
from models.weights.finetune import fine_tune
from models.weights.load import choose_weights, read_trained
from util.backbones import BACKBONES
from util.checkpoint import load_state
from util.class_map import AUTO, COCO_CLASSES, ClassMap, classes_of, unnamed_classes
from util.config import FLAGS, LEARNED_POSITIONS, BackboneConfig, Config, with_classes
from util.errors import UserError

log = logging.getLogger(__name__)

# flags that load_model takes
_FLAGS = {name for name, flag in FLAGS.items() if flag.group != "run"} - {"frozen_weights"}


class LoadedModel(NamedTuple):
    """What `load_model` gives.

    postprocessors: {"bbox": PostProcess}; config.classes: ids and names of the labels.
    """

    model: DeformableDETR
    criterion: SetCriterion
    postprocessors: dict[str, PostProcess]
    config: Config


def load_model(
    checkpoint: str | os.PathLike[str],
    *,
    classes: ClassMap | None = None,
    weights: str = "auto",
    **flags: Any,
) -> LoadedModel:
    """The detector of a checkpoint, with all that training and evaluation need.

        model, criterion, postprocessors, config = load_model("checkpoint.pth")
        dataset = build_dataset("val", config)

    The model is on the CPU, in training mode, and has BatchFormerV2 if it was trained with it. The
    config holds the flags of that training as far as the file has them, else the published
    defaults. Data sets built from it use its classes.

    Args:
        checkpoint: as for `load_detector`: ours, published, Hugging Face's; a path or an https
            address.
        classes: the classes of other data (`build_dataset(...).classes`) to train on. Rows of the
            class heads are copied where names match, the others start new, as with --finetune.
        weights: "ema" the averaged weights (--ema_decay), "model" the others, "auto" the averaged
            where the file has them, unless their last evaluation was worse.
        flags: flags of main.py that replace those of the file: coco_path, eval_size, lr, bf and so
            on; not num_classes and frozen_weights, and none of the group run. Tuples or lists for
            several values.

    Raises:
        UserError (a ValueError): the file can't be read, holds no detector, or one that contradicts
            `flags`; a flag is unknown or has an invalid value.
    """
    source, flag = os.fspath(checkpoint), "checkpoint"
    given = _checked_flags(flags)
    content = read_trained(source, flag)
    state, _ = choose_weights(content, source, flag, weights)
    content = {**content, "model": state}

    # the architecture is the file's, the classes the caller's
    config = adopt(
        as_given(given, finetune=source),
        content,
        source,
        flag,
        Purpose.BUILD,
        without_heads=classes is not None,
    )
    config = with_classes(config, classes or classes_of(content, source) or unnamed_classes(state))
    model, criterion, postprocessors = build_model(config)

    # rows by name, or all weights as they are
    if classes:
        log.info("%s", fine_tune(model, config, classes, content, source, flag, weights))
    else:
        report = load_state(model, content, source, flag)
        report.require_same_architecture()
        log.info("%s", report)
    return LoadedModel(model, criterion, postprocessors, config)


def _checked_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with paths as text. Raises UserError for one that load_model does not take."""
    # the classes are an argument of their own
    for name in flags:
        if name == "num_classes" or name not in _FLAGS:
            raise UserError(
                f"{name} is no flag that load_model takes; see python main.py --help, and "
                f"`classes` for classes"
            )
    return {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in flags.items()
    }


def build_model(
    config: Config, classes: ClassMap | None = None, *, pretrained: bool | None = None
) -> tuple[DeformableDETR, SetCriterion, dict[str, PostProcess]]:
    """The detector, its losses, and {"bbox": postprocessor}.

    Args:
        config: the flags. --num_classes auto needs `classes`.
        classes: those of the data (`build_dataset(...).classes`). Without them "auto" means COCO's
            91 logits, and a warning is logged.
        pretrained: whether the backbone starts with --backbone_weights. By default it does unless
            --resume, --finetune or --frozen_weights name a checkpoint, which replaces its weights.

    Raises:
        UserError: the backbone's weights can't be had or don't fit.
    """
    if config.data.num_classes == AUTO and classes is None:
        log.warning(
            "build_model: --num_classes auto without classes gives the 91 logits of COCO; for "
            "other data use build_model(config, build_dataset('train', config).classes)"
        )
        classes = COCO_CLASSES
    if classes:
        config = with_classes(config, classes)

    # the backbone and the encoder know no classes: only the heads do
    transformer = config.transformer
    class_heads, box_heads = build_heads(
        transformer.hidden_dim,
        int(config.data.num_classes),
        transformer.dec_layers,
        transformer.with_box_refine,
        transformer.two_stage,
    )
    model = DeformableDETR(
        build_backbone(config, pretrained),
        build_position(config.backbone, transformer.hidden_dim),
        build_transformer(config),
        class_heads,
        box_heads,
        num_feature_levels=config.backbone.num_feature_levels,
        num_queries=transformer.num_queries,
        aux_loss=not config.loss.no_aux_loss,
        with_box_refine=transformer.with_box_refine,
        mask_head=build_masks(config) if config.segmentation.masks else None,
        frozen=bool(config.segmentation.frozen_weights),
    )
    return model, build_criterion(config), {"bbox": PostProcess()}


def build_backbone(config: Config, pretrained: bool | None = None) -> Backbone:
    backbone = config.backbone
    if pretrained is None:
        pretrained = not config.starts_from_weights
    weights = "none"
    if pretrained:
        weights = backbone.backbone_weights
    body = build_body(
        backbone.backbone,
        backbone.backbone_norm,
        weights,
        dilation=backbone.dilation,
        multi_scale=backbone.num_feature_levels > 1,
        fine=config.segmentation.masks,
    )

    # a random stem must learn too
    trains: tuple[str, ...] = BACKBONES[backbone.backbone].trains
    if backbone.backbone_weights == "none" and backbone.backbone_norm != "frozen_bn":
        trains = ("",)
    if config.optim.lr_backbone <= 0:
        trains = ()
    return Backbone(body, trains)


def build_position(backbone: BackboneConfig, hidden_dim: int) -> nn.Module:
    # half of the channels for each axis
    if backbone.position_embedding == "learned":
        return PositionEmbeddingLearned(hidden_dim // 2, LEARNED_POSITIONS)
    return PositionEmbeddingSine(hidden_dim // 2, scale=backbone.position_embedding_scale)


def build_transformer(config: Config) -> DeformableTransformer:
    transformer, bf = config.transformer, config.batchformer
    # one object with the weights, registered under their names, and one that applies them
    modules, batchformer = None, None
    if bf.bf != OFF:
        modules = build_modules(
            transformer.hidden_dim,
            transformer.enc_layers,
            bf.insert_idx,
            shared=bool(bf.share_bf),
            num_layers=bf.bt_num_layers,
            num_heads=bf.bf_heads,
            dropout=bf.bf_dropout,
            control=bf.bf_control,
        )
        batchformer = BatchFormerV2(
            modules,
            bf.bf,
            bf.insert_idx,
            bf.eval_bf,
            control=bf.bf_control,
            mask_padding=bf.bf_mask_padding,
            across_processes=bf.bf_across_processes,
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
        batchformer=batchformer,
        two_stage=transformer.two_stage,
        num_proposals=transformer.num_queries,
        checkpoint_encoder=transformer.checkpoint_encoder,
    )


def build_masks(config: Config) -> MaskHead:
    fine = BACKBONES[config.backbone.backbone].fine
    assert fine is not None  # util/config/checks.py
    return build_mask_head(fine[1], config.transformer.hidden_dim, config.backbone.num_feature_levels)


def build_criterion(config: Config) -> SetCriterion:
    loss = config.loss
    flags = WEIGHT_FLAGS | (MASK_WEIGHT_FLAGS if config.segmentation.masks else {})
    # the costs of the matching need not be the weights of the losses
    matcher = HungarianMatcher(loss.set_cost_class, loss.set_cost_bbox, loss.set_cost_giou, loss.focal_alpha)
    return SetCriterion(
        matcher,
        {name: getattr(loss, flag) for name, flag in flags.items()},
        num_aux_outputs=0 if loss.no_aux_loss else config.transformer.dec_layers - 1,
        with_proposals=config.transformer.two_stage,
        focal_alpha=loss.focal_alpha,
    )
