"""Flags: published names and defaults, both spellings, help, and the page of flags."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from util.config import FLAGS, Config, parse_config
from util.errors import UserError

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


def test_the_flags_that_differ_from_their_defaults():
    assert parse_config([]).non_default_flags() == {}
    flags = ["--lr_drop_epochs", "3", "--eval_size", "800", "--sgd"]
    assert parse_config(flags).non_default_flags() == {"lr_drop_epochs": (3,), "sgd": True}


def test_help_shows_every_flag_once_and_needs_no_torch():
    code = "import sys; import util.config as c; c.parse_config([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = "from util.config import parse_config; parse_config(['--help'])"
    shown = " ".join(output_of("-c", code).split())
    for name, flag in FLAGS.items():
        assert f"--{name.replace('_', '-')} " not in shown or "_" not in name
        assert bool(re.search(rf" --{name} ", shown)) == (not flag.refused)
        if isinstance(flag.default, float) and not flag.refused:
            assert f"(default: {flag.default})" in shown


def test_help_of_a_script_shows_its_values_as_defaults():
    code = "from util.config import parse_config; parse_config(['--lr', '0.5', '--epochs', '7', '--help'])"
    shown = " ".join(output_of("-c", code).split())
    assert "the heads (default: 0.5)" in shown
    assert "whole run (default: 7)" in shown


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("--batch_sise", "--batch_size"), ("--batch-siz=3", "--batch_size"), ("--epoch", "--epochs")],
)
def test_a_wrong_flag_gets_the_right_one_in_the_message(wrong, meant):
    with pytest.raises(UserError, match=rf"{wrong} 3; did you mean {meant}\?"):
        parse_config([wrong, "3"])


def test_a_flag_like_no_other_gets_no_suggestion():
    with pytest.raises(UserError, match=r"unrecognized arguments: --zzz \("):
        parse_config(["--zzz"])


def test_the_page_of_flags_is_what_the_command_prints():
    page = ROOT / "docs" / "flags.md"
    assert page.read_text() == output_of("-m", "util.config"), "python -m util.config > docs/flags.md"


def output_of(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
