"""Flags: published names and defaults, both spellings, and help."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from util.config import Config, parse_config

# spec of the published program: name -> default
PUBLISHED = {
    "lr": 2e-4,
    "lr_backbone_names": ["backbone.0"],
    "lr_backbone": 2e-5,
    "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    "lr_linear_proj_mult": 0.1,
    "batch_size": 2,
    "weight_decay": 1e-4,
    "epochs": 50,
    "lr_drop": 40,
    "lr_drop_epochs": [],
    "clip_max_norm": 0.1,
    "sgd": False,
    "with_box_refine": False,
    "two_stage": False,
    "backbone": "resnet50",
    "dilation": False,
    "position_embedding": "sine",
    "position_embedding_scale": 2 * math.pi,
    "num_feature_levels": 4,
    "enc_layers": 6,
    "dec_layers": 6,
    "dim_feedforward": 1024,
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "num_queries": 300,
    "dec_n_points": 4,
    "enc_n_points": 4,
    "masks": False,
    "frozen_weights": "",
    "no_aux_loss": False,
    "set_cost_class": 2,
    "set_cost_bbox": 5,
    "set_cost_giou": 2,
    "mask_loss_coef": 1,
    "dice_loss_coef": 1,
    "cls_loss_coef": 2,
    "bbox_loss_coef": 5,
    "giou_loss_coef": 2,
    "focal_alpha": 0.25,
    "dataset_file": "coco",
    "coco_path": "./data/coco",
    "coco_panoptic_path": "",
    "remove_difficult": False,
    "cache_mode": False,
    "num_workers": 2,
    "output_dir": "",
    "seed": 42,
    "resume": "",
    "start_epoch": 0,
    "eval": False,
    "bf": 0,
    "share_bf": 1,
    "bt_num_layers": 1,
    "insert_idx": [],
    "eval_bf": False,
    "drop_path": 0,
}


def test_published_defaults():
    flags = parse_config([]).flags()
    assert {name: flags[name] for name in PUBLISHED} == PUBLISHED


def test_both_spellings():
    a = parse_config(
        ["--batch-size", "3", "--share-bf", "0", "--bf", "1", "--insert-idx", "0", "--with-box-refine"]
    )
    b = parse_config(
        ["--batch_size", "3", "--share_bf", "0", "--bf", "1", "--insert_idx", "0", "--with_box_refine"]
    )
    assert a == b
    assert a.optim.batch_size == 3


def test_insertions_accumulate():
    for flags in (["--insert_idx", "3", "--insert_idx", "1"], ["--insert_idx", "3", "1"]):
        assert parse_config(["--bf", "1", *flags]).batchformer.insert_idx == (3, 1)


def test_a_config_is_frozen_and_plain():
    config = parse_config(["--lr_drop_epochs", "3", "5"])
    assert isinstance(config, Config)
    for part in (config, config.optim, config.batchformer):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.x = 1
    assert json.loads(json.dumps(config.flags())) == config.flags()
    assert config.flags()["lr_drop_epochs"] == [3, 5]


def test_help_names_every_flag_and_needs_no_torch():
    code = "import sys; import util.config as c; c.parse_config([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    shown = " ".join(shown.split())
    for name, value in parse_config([]).flags().items():
        assert f"--{name}" in shown
        if isinstance(value, float) and value:
            assert f"(default: {value})" in shown
