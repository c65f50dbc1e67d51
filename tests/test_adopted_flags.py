"""What a run takes from the checkpoint that it starts with, what its own flags decide, and what has
no say.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import pytest
import torch

from models import build_model
from models.weights.architecture import Purpose, adopt
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_forked, run_main_forked
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.errors import UserError

TWO_STAGE = ("--with_box_refine", "--two_stage")
PLAIN_ARM = ("--bf", "0", "--share_bf", "0", "--insert_idx", "0")


@cache
def checkpoint(*flags: str) -> dict:
    """A run's; not to be changed."""
    config = parse_config([*SMALL_MODEL, *SMALL_IMAGES, *flags])
    model = build_model(config)[0]
    recipe.fill(model)
    return {"model": model.state_dict(), "args": config.flags(), "processes": []}


def evaluated(content: dict, *flags: str):
    return adopt(parse_config(["--resume", "a.pth", "--eval", *flags]), content, "a.pth")


def resumed(content: dict, *flags: str):
    return adopt(parse_config(["--resume", "a.pth", *flags]), content, "a.pth", purpose=Purpose.RESUME)


def fine_tuned(content: dict, *flags: str):
    return adopt(
        parse_config(["--finetune", "a.pth", *flags]), content, "a.pth", "--finetune", Purpose.FINE_TUNE
    )


ARCHITECTURES = [
    (),
    TWO_STAGE,
    ("--num_feature_levels", "1", "--dec_layers", "3"),
    ("--nheads", "2", "--enc_n_points", "1"),
    ("--backbone_norm", "frozen_bn", "--position_embedding_scale", "3"),
]
NAMES = (
    "backbone",
    "backbone_norm",
    "position_embedding_scale",
    "num_feature_levels",
    "enc_layers",
    "dec_layers",
    "nheads",
    "dim_feedforward",
    "hidden_dim",
    "num_queries",
    "enc_n_points",
    "with_box_refine",
    "two_stage",
)


@pytest.mark.parametrize("flags", ARCHITECTURES, ids=" ".join)
@pytest.mark.parametrize("purpose", [evaluated, resumed, fine_tuned])
def test_the_architecture_is_the_checkpoints(flags, purpose):
    content = checkpoint(*flags)
    found = purpose(content).flags()
    assert {name: found[name] for name in NAMES} == {name: content["args"][name] for name in NAMES}


@pytest.mark.parametrize("purpose", [evaluated, resumed, fine_tuned])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--hidden_dim", "128"), "give --hidden_dim 64"),
        (("--nheads", "8"), "give --nheads 4"),
        (("--two_stage",), "leave out --two_stage"),
        (("--backbone", "resnet50", "--dilation"), "give --backbone resnet18 and leave out --dilation"),
        (("--backbone_norm", "bn"), "give --backbone_norm gn"),
        (("--enc_layers", "1", "--dec_layers", "6"), "give --enc_layers 2 --dec_layers 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_flag_that_contradicts_it_is_refused_with_those_to_give(purpose, flags, told):
    with pytest.raises(UserError) as error:
        purpose(checkpoint(), *flags)
    flag = "--finetune" if purpose is fine_tuned else "--resume"
    assert str(error.value) == f"{flag} a.pth is of another detector: {told}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("nheads", "4"), ("eval_size", "large"), ("max_size", [96]), ("dilation", torch.ones(3)), ("bf", 1.5)],
)
def test_flags_that_a_checkpoint_can_not_have_are_told(name, value):
    content = checkpoint()
    with pytest.raises(UserError, match=r"^--resume a\.pth ") as error:
        evaluated(
            {**content, "args": {**content["args"], "eval_bf": True, name: value}}, "--num_queries", "12"
        )
    assert "\n" not in str(error.value)


def test_a_flag_that_agrees_needs_no_other_beside_it():
    """--two_stage alone would be refused without a checkpoint, and so would ImageNet's weights with
    gn.
    """
    assert evaluated(checkpoint(*TWO_STAGE), "--two_stage").transformer.with_box_refine
    assert evaluated(checkpoint(), "--backbone_norm", "gn").backbone.backbone_norm == "gn"
    assert resumed(checkpoint(*TWO_STAGE), "--two_stage", "--num_queries", "9").transformer.num_queries == 9
    with pytest.raises(UserError, match="--two_stage needs --with_box_refine"):
        parse_config(["--two_stage"])


def test_a_line_says_what_was_taken(caplog):
    caplog.set_level("INFO")
    evaluated(checkpoint(), "--hidden_dim", "64", "--eval_size", "50")
    assert caplog.messages == [
        "taken from a.pth: --backbone resnet18 --backbone_norm gn --enc_layers 2 --dec_layers 2 "
        "--dim_feedforward 64 --nheads 4 --num_queries 12 --max_size 96"
    ]
    caplog.clear()
    fine_tuned(checkpoint(), *SMALL_MODEL)
    assert caplog.messages == [], "nothing, where the flags say the same"


# ---- image sizes


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ((), (64, 96)),
        (("--max_size", "160"), (64, 160)),
        (("--eval_size", "80"), (80, 96)),
        (("--eval_size", "80", "--max_size", "120"), (80, 120)),
        (("--max_size", "40"), (40, 40)),  # no side is longer: as if 64 stood there
        (("--eval_size", "128"), (128, 192)),  # the same proportion
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_evaluation_takes_the_sizes_from_the_checkpoint_unless_they_are_given(flags, sizes):
    data = evaluated(checkpoint(), *flags).data
    assert (data.eval_size, data.max_size) == sizes


def test_without_a_word_about_sizes_they_are_the_published_ones():
    published = {"model": checkpoint()["model"], "args": argparse.Namespace(nheads=4, enc_layers=6)}
    assert (evaluated(published).data.eval_size, evaluated(published).data.max_size) == (800, 1333)
    assert evaluated(published, "--max_size", "160").data.eval_size == 160
    assert evaluated(published).transformer.enc_layers == 2, "the weights know better"


def test_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="--max_size 90 must be at least --eval_size 100"):
        evaluated(checkpoint(), "--max_size", "90", "--eval_size", "100")


def test_training_keeps_its_own_sizes():
    for config in (resumed(checkpoint()), fine_tuned(checkpoint())):
        assert (config.data.eval_size, config.data.max_size) == (800, 1333)


# ---- what only training needs


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_size", "160"),
        ("--train_sizes", "0"),
        ("--crop_sizes", "9", "1"),
        ("--epochs", "0"),
        ("--lr", "-1"),
        ("--start_epoch", "99"),
        ("--lr_drop_epochs", "5", "2"),
        ("--train_images", "x"),
        ("--save_every", "3"),
        ("--tensorboard",),
        ("--backbone_weights", "imagenet"),
        ("--accumulate_steps", "0"),
        ("--keep", "0"),
        ("--bf", "1"),
        ("--insert_idx", "77"),
        ("--ema_decay", "1"),
    ],
    ids=" ".join,
)
def test_evaluation_does_not_look_at_what_only_training_needs(flags):
    assert evaluated(checkpoint(), *flags).settled


def test_what_evaluation_needs_it_looks_at():
    for flags, told in (
        (("--batch_size", "0"), "--batch_size 0"),
        (("--val_images", "x"), "--val_annotations"),
    ):
        with pytest.raises(UserError, match=told):
            evaluated(checkpoint(), *flags)


# ---- BatchFormerV2


def test_bf_0_switches_the_module_off_whatever_stands_beside_it():
    config = parse_config(PLAIN_ARM)
    assert config.batchformer.bf == 0
    assert config.without_effect() == ["share_bf", "insert_idx"]
    assert build_model(parse_config([*SMALL_MODEL, *PLAIN_ARM]))[0].transformer.bf is None
    assert parse_config(BATCHFORMER).without_effect() == []
    with pytest.raises(UserError, match="--insert_idx needs BatchFormerV2; add --bf 1"):
        parse_config(["--insert_idx", "0"])


def test_the_checkpoint_of_a_plain_arm_is_as_good_as_any():
    content = checkpoint(*PLAIN_ARM)
    assert content["args"]["insert_idx"] == [0]
    for config in (evaluated(content), resumed(content), fine_tuned(content), resumed(content, *PLAIN_ARM)):
        assert config.batchformer.bf == 0


def test_a_detector_without_the_module_is_not_evaluated_with_it():
    with pytest.raises(UserError, match="was trained without BatchFormerV2; leave --eval_bf out"):
        evaluated(checkpoint(), "--eval_bf")


def test_evaluation_does_without_the_module_unless_it_is_asked_for():
    content = checkpoint(*BATCHFORMER)
    assert evaluated(content).batchformer.bf == 0
    given = evaluated(content, *BATCHFORMER)
    assert given.batchformer.bf == 0
    assert given.without_effect() == ["share_bf", "insert_idx"]
    module = evaluated(content, "--eval_bf").batchformer
    assert (module.bf, module.share_bf, module.insert_idx, module.eval_bf) == (1, 0, (0,), True)
    trained_so = checkpoint(*BATCHFORMER, "--eval_bf")
    assert evaluated(trained_so).batchformer == module
    assert evaluated(trained_so, "--bf", "0").batchformer.bf == 0
    with pytest.raises(UserError, match="give --bf 1 --share_bf 0 --bt_num_layers 1 --insert_idx 0"):
        evaluated(trained_so, "--insert_idx", "1")


def test_resuming_goes_on_with_the_module_and_fine_tuning_chooses_anew():
    content = checkpoint(*BATCHFORMER)
    assert resumed(content).batchformer.insert_idx == (0,)
    assert resumed(content, "--bf", "7").batchformer.bf == 7, "the same weights in another way"
    assert fine_tuned(content).batchformer.bf == 0
    with pytest.raises(
        UserError, match=r"is of another detector: give --bf 1 --share_bf 0 --bt_num_layers 1 --insert_idx 0$"
    ):
        resumed(content, "--bf", "0")
    with pytest.raises(UserError, match=r"give --bf 1 .* --insert_idx 0 --bf_heads 4$"):
        resumed(content, "--bf_heads", "2")
    with pytest.raises(UserError, match=r"give --bf 1 .* --insert_idx 0 --bf_control identity$"):
        resumed(checkpoint(*BATCHFORMER, "--bf_control", "identity"), "--bf_control", "none")
    with pytest.raises(UserError, match=r"a\.pth is of another detector: give --bf 0"):
        resumed(checkpoint(), *BATCHFORMER)
    published = {name: content[name] for name in ("model", "args")}
    assert resumed(published, "--bf", "0").batchformer.bf == 0, "no run of ours goes on"


# ---- the program


@pytest.fixture
def data(tmp_path) -> Path:
    write_coco(tmp_path / "data", num_train=4, num_val=3)
    return tmp_path / "data"


def last_figures(out: Path) -> list[float]:
    return json.loads((out / "log.txt").read_text().splitlines()[-1])["test_coco_eval_bbox"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "flags", [BATCHFORMER, (*TWO_STAGE, "--backbone_norm", "bn", "--num_classes", "auto")], ids=" ".join
)
def test_a_run_is_evaluated_without_its_flags_and_nothing_of_it_is_replaced(tmp_path, data, flags):
    out = tmp_path / "out"
    trained = run_main_forked(
        "--coco_path",
        str(data),
        *SMALL_MODEL,
        *SMALL_IMAGES,
        *flags,
        "--epochs",
        "1",
        "--output_dir",
        str(out),
        "--save_predictions",
        "--lr",
        "0.01",
    )
    assert trained.returncode == 0, trained.stderr
    before, figures = contents(out), last_figures(out)
    command = ("--resume", str(out / "checkpoint.pth"), "--eval", "--coco_path", str(data))
    for number in (1, 2):
        result = run_main_forked(*command, "--output_dir", str(out), "--save_predictions")
        assert result.returncode == 0, result.stderr
        folder = out / f"evaluation-{number}"
        assert f"the evaluation is in {folder / 'eval.pth'}\n" in result.stdout
        assert read_checkpoint(folder / "eval.pth")["stats"] == figures
        assert {path.name for path in folder.iterdir()} == {"eval.pth", "predictions.json", "run.json"}
    assert contents(out) == before
    assert json.loads((folder / "predictions.json").read_text()) == json.loads(before["predictions.json"])
    elsewhere = run_main_forked(*command, "--output_dir", str(tmp_path / "elsewhere"))
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"eval.pth", "run.json"}
    newest = run_main_forked("--resume", "auto", "--eval", "--coco_path", str(data), "--output_dir", str(out))
    assert newest.returncode == 0, newest.stderr
    assert read_checkpoint(out / "evaluation-3/eval.pth")["stats"] == figures


def test_a_run_goes_on_without_the_flags_of_its_detector(tmp_path, data):
    flags = ("--coco_path", str(data), *SMALL_IMAGES, "--num_workers", "0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    detector = (*SMALL_MODEL[:-2], *BATCHFORMER, "--dropout", "0")
    for out, epochs in ((whole, "2"), (parts, "1")):
        assert (
            run_main_forked(*flags, *detector, "--epochs", epochs, "--output_dir", str(out)).returncode == 0
        )
    result = run_main_forked(
        *flags,
        "--dropout",
        "0",
        "--epochs",
        "2",
        "--output_dir",
        str(parts),
        "--resume",
        str(parts / "checkpoint.pth"),
    )
    assert result.returncode == 0, result.stderr
    ends = [read_checkpoint(out / "checkpoint.pth")["model"] for out in (whole, parts)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_the_benchmark_measures_the_detector_of_the_checkpoint(tmp_path):
    torch.save(checkpoint(*TWO_STAGE), tmp_path / "a.pth")
    few = ("--num_iters", "1", "--warm_iters", "0", "--size", "64", "64")
    result = run_forked("benchmark.py", "--resume", str(tmp_path / "a.pth"), *few)
    assert result.returncode == 0, result.stderr
    assert "inference: " in result.stdout
    refused = run_forked("benchmark.py", "--resume", str(tmp_path / "a.pth"), *few, "--enc_layers", "3")
    assert "is of another detector: give --enc_layers 2\n" in refused.stderr


def test_a_published_head_is_cocos_whatever_part_of_it_the_data_has(tmp_path, data):
    """A Namespace with none of our flags, 91 logits, and two of COCO's categories."""
    annotations = data / "annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 18
    annotations.write_text(json.dumps(content))
    config = parse_config([*SMALL_MODEL, "--num_classes", "91"])
    model = build_model(config)[0]
    recipe.fill(model)
    args = argparse.Namespace(
        nheads=4, masks=False, frozen_weights=None, lr_drop_epochs=None, coco_path="elsewhere"
    )
    torch.save({"model": model.state_dict(), "args": args, "epoch": 49}, tmp_path / "published.pth")
    result = run_main_forked(
        "--resume",
        str(tmp_path / "published.pth"),
        "--eval",
        "--coco_path",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
        "--save_predictions",
        "--max_size",
        "96",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len({row["category_id"] for row in found}) > 2, "all of COCO's can be found"


def test_ids_are_the_labels_of_a_head_that_nobody_names(tmp_path, data):
    torch.save({"model": checkpoint()["model"], "args": checkpoint()["args"]}, tmp_path / "a.pth")
    result = run_main_forked(
        "--resume",
        str(tmp_path / "a.pth"),
        "--eval",
        "--coco_path",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
        "--save_predictions",
    )
    assert result.returncode == 0, result.stderr
    assert "category ids are taken for the numbers of its 4 logits" in result.stdout
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {row["category_id"] for row in found} == {0, 1, 2, 3}
