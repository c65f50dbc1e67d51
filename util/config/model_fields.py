"""The flags of the detector and its losses: groups of the table in util/config/fields.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from util.backbones import BACKBONES
from util.config.flag import flag

# rows and columns of the table of learned position encodings
LEARNED_POSITIONS = 50


@dataclass(frozen=True)
class BatchFormerConfig:
    """BatchFormerV2"""

    of = "architecture"

    # 1 and 7 are the values of the published program
    bf: int = flag(
        0, "in training: 0 off, 1 two streams (plain and mixed), 7 the mixed stream only", choices=(0, 1, 7)
    )
    share_bf: int = flag(1, "1: one module for all insertions; 0, as published: one for each", choices=(0, 1))
    bt_num_layers: int = flag(1, "transformer layers in a module", above=0)
    insert_idx: tuple[int, ...] = flag(
        (),
        "encoder layers after which the module acts, counted from 0; needed with --bf",
        "LAYER",
        repeat=True,
    )
    # off as published: a detection should not depend on the other images of its batch
    eval_bf: bool = flag(
        False, "use the module in evaluation too, across the images of the evaluation batch (default: off)"
    )
    # as published; with other values the module has the same weights
    bf_heads: int = flag(4, "attention heads of the module", "HEADS", above=0)
    bf_dropout: float = flag(0.5, "dropout of the module", "RATE", below=1, of="model")
    bf_mask_padding: bool = flag(
        False, "padding takes no part: it neither attends nor is attended to, and is not changed", of="model"
    )
    bf_across_processes: bool = flag(
        False, "relate the images of all processes, not only those of one", of="model"
    )
    bf_control: str = flag(
        "none",
        "for comparisons. identity: two streams without a module; copies: copies of each image "
        "instead of the other images",
        choices=("none", "identity", "copies"),
    )


@dataclass(frozen=True)
class BackboneConfig:
    """backbone"""

    of = "architecture"

    backbone: str = flag("resnet50", "a ResNet of torchvision", choices=tuple(BACKBONES))
    # a checkpoint brings the weights, so resuming needs no others
    backbone_weights: str = flag(
        "imagenet",
        "imagenet (ImageNet V1 of torchvision), none (random), or a state-dict file",
        of="model",
        free_on_resume=True,
    )
    backbone_norm: str = flag(
        "frozen_bn",
        "frozen_bn (as published, needs trained weights), bn or gn (for a network that starts "
        "from random weights)",
        choices=("frozen_bn", "bn", "gn"),
    )
    # changes strides only, so that weights do not show it
    dilation: bool = flag(False, "DC5: dilation instead of the last stride", in_tools=True)
    position_embedding: str = flag("sine", "position encoding", choices=("sine", "learned"))
    position_embedding_scale: float = flag(
        2 * math.pi, "scale of the sine position encoding", above=0, in_tools=True
    )
    num_feature_levels: int = flag(
        4,
        "1 (the last map of the backbone), or 3 and more (strides 8, 16, 32; further maps halve the size)",
        above=0,
    )


@dataclass(frozen=True)
class TransformerConfig:
    """transformer"""

    of = "architecture"

    enc_layers: int = flag(6, "encoder layers", above=0)
    dec_layers: int = flag(6, "decoder layers", above=0)
    dim_feedforward: int = flag(1024, "width of the feed-forward blocks", "WIDTH", above=0)
    hidden_dim: int = flag(256, "width of the tokens", "WIDTH", above=0)
    # these two act in training only
    dropout: float = flag(0.1, "dropout of the transformer", "RATE", below=1, of="model")
    drop_path: float = flag(
        0.0,
        "stochastic depth of the encoder's and decoder's residual branches: 0 in the first layer, "
        "this in the last",
        "RATE",
        below=1,
        of="model",
    )
    # the attention projections have the same shape for any number of heads
    nheads: int = flag(8, "attention heads", "HEADS", above=0, in_tools=True)
    # in two stages queries have no weights
    num_queries: int = flag(300, "object queries", above=0, in_tools=True)
    dec_n_points: int = flag(4, "sampling points per head and level in the decoder", above=0)
    enc_n_points: int = flag(4, "sampling points per head and level in the encoder", above=0)
    with_box_refine: bool = flag(False, "iterative bounding box refinement")
    two_stage: bool = flag(False, "queries from the encoder's proposals; needs --with_box_refine")
    # the gradients stay bit-identical
    checkpoint_encoder: bool = flag(
        False,
        "compute the encoder's activations again in the backward instead of keeping them: less "
        "memory, same gradients",
        of="model",
        free_on_resume=True,
    )


@dataclass(frozen=True)
class SegmentationConfig:
    """segmentation"""

    of = "architecture"

    masks: bool = flag(False, "instance segmentation: a mask for every detection")
    # like --finetune it says where a training starts
    frozen_weights: str = flag(
        "",
        "with --masks: a trained detector, which stays as it is: only the mask head trains",
        "FILE",
        of="training",
    )


@dataclass(frozen=True)
class LossConfig:
    """matching and losses"""

    of = "model"

    no_aux_loss: bool = flag(False, "no losses at the intermediate decoder layers")
    # costs and weights as in the paper of Deformable DETR, section 5
    set_cost_class: float = flag(2.0, "class cost in the matching", "COST")
    set_cost_bbox: float = flag(5.0, "L1 box cost in the matching", "COST")
    set_cost_giou: float = flag(2.0, "generalised IoU cost in the matching", "COST")
    mask_loss_coef: float = flag(1.0, "with --masks: weight of their focal loss", "WEIGHT")
    dice_loss_coef: float = flag(1.0, "with --masks: weight of their dice loss", "WEIGHT")
    cls_loss_coef: float = flag(2.0, "weight of the class loss", "WEIGHT")
    bbox_loss_coef: float = flag(5.0, "weight of the L1 box loss", "WEIGHT")
    giou_loss_coef: float = flag(2.0, "weight of the generalised IoU loss", "WEIGHT")
    focal_alpha: float = flag(0.25, "alpha of the focal loss")
