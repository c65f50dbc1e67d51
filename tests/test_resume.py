"""Checkpoints: what is in them, what is refused, and that a resumed run is the run that never
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from models import build_model
from tests.faults.compare import differences
from tests.golden import recipe
from tests.helpers import BATCHFORMER, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from util.checkpoint import load_weights, read_checkpoint, write_atomically
from util.config import parse_config
from util.errors import UserError


def small_model(*flags):
    torch.manual_seed(0)
    return build_model(parse_config([*SMALL_MODEL, *flags]))[0]


@pytest.fixture
def data(tmp_path):
    write_coco(tmp_path / "data", num_train=6, num_val=3)
    return ("--coco_path", str(tmp_path / "data"), *SMALL_IMAGES, *SMALL_MODEL)


@pytest.mark.parametrize(
    "extra",
    [BATCHFORMER, ("--backbone_norm", "bn", "--sgd", "--accumulate_steps", "2", "--num_workers", "0")],
)
def test_stop_and_resume_is_bit_identical_to_never_stopping(tmp_path, data, extra):
    """Three epochs in one go, and one epoch followed by two more; with dropout and augmentation."""
    common = (*data, *extra, "--lr_drop", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_main_forked(*common, "--epochs", "3", "--output_dir", str(whole)).returncode == 0
    assert run_main_forked(*common, "--epochs", "1", "--output_dir", str(parts)).returncode == 0
    resumed = run_main_forked(
        *common, "--epochs", "3", "--output_dir", str(parts), "--resume", str(parts / "checkpoint.pth")
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "WARNING" not in resumed.stdout
    assert differences(whole, parts) == []
    assert read_checkpoint(parts / "checkpoint.pth")["lr_scheduler"]["last_epoch"] == 3
    lines = [json.loads(line) for line in (parts / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[2]["train_lr"] == pytest.approx(lines[1]["train_lr"] / 10)


def test_resume_says_what_changed_and_ends_clearly(tmp_path, data):
    out = tmp_path / "out"
    assert run_main_forked(*data, "--epochs", "1", "--output_dir", str(out)).returncode == 0
    before = [(out / name).read_bytes() for name in ("checkpoint.pth", "run.json")]
    done = run_main_forked(
        *data, "--epochs", "1", "--output_dir", str(out), "--resume", str(out / "checkpoint.pth")
    )
    assert done.returncode == 2
    assert "raise --epochs" in done.stderr
    same = ("--output_dir", str(out), "--resume", str(out / "checkpoint.pth"))
    detector = run_main_forked(*data, *BATCHFORMER, "--epochs", "2", *same)
    assert detector.returncode == 2
    assert "is of another detector: give --bf 0" in detector.stderr
    other = run_main_forked(*data, "--lr_backbone", "0", "--epochs", "2", *same)
    assert other.returncode == 2
    told = (
        "its state does not fit this run: --lr_backbone was 2e-05 in the checkpoint and is 0.0 in this run;"
    )
    assert told in other.stderr
    assert "ValueError" not in other.stderr
    nothing_left = run_main_forked(*data, "--epochs", "1", "--output_dir", str(out), "--resume", "auto")
    assert "1 epochs have been trained and evaluated, --epochs is 1" in nothing_left.stdout
    after = [(out / name).read_bytes() for name in ("checkpoint.pth", "run.json")]
    assert after == before, "starts that train nothing leave no trace"
    changed = run_main_forked(
        *data,
        "--lr",
        "1e-5",
        "--epochs",
        "2",
        "--output_dir",
        str(out),
        "--resume",
        str(out / "checkpoint.pth"),
    )
    assert changed.returncode == 0, changed.stderr
    assert (
        "resume: --lr was 0.0002 in the checkpoint and is 1e-05 in this run; the new value is used"
        in changed.stdout
    )
    assert "resume: --epochs" not in changed.stdout, "a finished run may be continued"
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["train_lr"] for line in lines] == pytest.approx([2e-4, 1e-5])


def test_a_second_run_does_not_overwrite_the_first(tmp_path, data):
    out = tmp_path / "out"
    flags = (*data, "--epochs", "1", "--output_dir", str(out))
    assert run_main_forked(*flags).returncode == 0
    first = (out / "checkpoint.pth").read_bytes()
    second = run_main_forked(*flags, "--seed", "7")
    assert second.returncode == 0
    assert "earlier-1" in second.stdout
    assert (out / "earlier-1" / "checkpoint.pth").read_bytes() == first
    assert (out / "checkpoint.pth").read_bytes() != first


def test_checkpoints_come_with_the_published_names_and_times(tmp_path, data):
    out = tmp_path / "out"
    result = run_main_forked(
        *data, "--epochs", "6", "--lr_drop", "3", "--eval_every", "4", "--output_dir", str(out)
    )
    assert result.returncode == 0, result.stderr
    names = {p.name for p in out.glob("*.pth")}
    published = {"checkpoint.pth", "checkpoint0002.pth", "checkpoint0004.pth", "checkpoint0005.pth"}
    assert names == published | {
        "checkpoint_best.pth",
        "resume_0005_000000000.pth",
        "resume_0006_000000000.pth",
    }
    assert (out / "eval" / "latest.pth").exists()
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert ["test_coco_eval_bbox" in line for line in lines] == [False, False, False, True, False, True]
    assert all(
        {"train_loss", "train_lr", "train_grad_norm", "epoch", "n_parameters"} <= set(line) for line in lines
    )
    checkpoint = read_checkpoint(out / "checkpoint.pth")
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args"} <= set(checkpoint)
    assert checkpoint["args"]["lr_drop"] == 3


# ---- published checkpoints


def published(model, path, **entries):
    """As the published program writes: aliases, a Namespace, a profiler's leftovers."""
    state = OrderedDict(model.state_dict())
    for name in list(state):
        if name.startswith(("class_embed.", "bbox_embed.")):
            state[f"transformer.decoder.{name}"] = state[name]
        if name.startswith("transformer.bf."):
            state[name.replace("transformer.bf.", "transformer.encoder.bf.")] = state[name]
    state["transformer.total_params"] = torch.zeros(1)
    state["backbone.0.body.layer1.total_ops"] = torch.zeros(1)
    torch.save(
        {"model": state, "epoch": 49, "args": argparse.Namespace(lr=2e-4, device="cuda"), **entries}, path
    )


def test_published_checkpoints_load_and_evaluate_like_ours(tmp_path, data):
    model = small_model(*BATCHFORMER, "--with_box_refine")
    recipe.fill(model)
    published(model, tmp_path / "published.pth")
    fresh = small_model(*BATCHFORMER, "--with_box_refine")
    report = load_weights(fresh, str(tmp_path / "published.pth"))
    assert not report.missing
    assert not report.unexpected
    assert set(report.loaded) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    # the documented evaluation names no BatchFormer flags: its weights are then the only ones left
    # over
    result = run_main_forked(
        *data,
        "--resume",
        str(tmp_path / "published.pth"),
        "--eval",
        "--output_dir",
        str(tmp_path / "out"),
        "--save_predictions",
    )
    assert result.returncode == 0, result.stderr
    assert "BatchFormerV2: 12 tensors skipped, which this run does not use\n" in result.stdout
    assert "unexpected" not in result.stdout
    assert "AP50" in result.stdout
    saved = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(saved[0])
    assert {r["image_id"] for r in saved} == {10, 11, 12}


def test_training_goes_on_from_published_weights(tmp_path, data):
    published(
        small_model(),
        tmp_path / "published.pth",
        optimizer={"state": {}, "param_groups": []},
        lr_scheduler={},
    )
    result = run_main_forked(
        *data,
        "--resume",
        str(tmp_path / "published.pth"),
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert result.returncode == 0, result.stderr
    assert "the optimiser starts afresh" in result.stdout


def test_missing_and_unexpected_names_are_listed(tmp_path):
    state = small_model().state_dict()
    state["something.else"] = torch.zeros(2)
    del state["query_embed.weight"]
    torch.save({"model": state}, tmp_path / "a.pth")
    report = load_weights(small_model(), str(tmp_path / "a.pth"))
    assert report.missing == ("query_embed.weight",)
    assert report.unexpected == ("something.else",)
    assert "query_embed.weight" in str(report)
    with pytest.raises(UserError, match="another architecture"):
        report.require_same_architecture()


@pytest.mark.parametrize(
    ("flags", "named", "flag"),
    [
        (("--num_classes", "7"), "class_embed.0.weight", "--num_classes"),
        (("--num_queries", "5"), "query_embed.weight", "--num_queries"),
        (("--enc_n_points", "2"), "encoder.layers.0.self_attn.sampling_offsets", "--enc_n_points"),
        (("--dec_n_points", "2"), "decoder.layers.0.cross_attn.sampling_offsets", "--dec_n_points"),
        (("--dim_feedforward", "96"), "linear1", "--dim_feedforward"),
        (("--num_feature_levels", "3"), "level_embed", "--num_feature_levels"),
    ],
)
def test_a_shape_that_differs_names_tensor_and_flag(tmp_path, flags, named, flag):
    torch.save({"model": small_model().state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        load_weights(small_model(*flags), str(tmp_path / "a.pth"))
    assert named in str(error.value)
    assert flag in str(error.value)


def test_refined_heads_do_not_load_into_a_shared_one(tmp_path):
    model = small_model("--with_box_refine")
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="--with_box_refine"):
        load_weights(small_model(), str(tmp_path / "a.pth"))


# ---- files that are not what they should be


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_malicious(path, marker):
    torch.save({"model": {}, "args": Evil(marker)}, path)


def write_malicious_plain_pickle(path, marker):
    path.write_bytes(pickle.dumps({"model": {}, "args": Evil(marker)}))


def write_malicious_namespace(path, marker):
    torch.save({"model": {}, "args": argparse.Namespace(device=Evil(marker))}, path)


@pytest.mark.parametrize("write", [write_malicious, write_malicious_plain_pickle, write_malicious_namespace])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, write):
    write(tmp_path / "a.pth", tmp_path / "executed")
    with pytest.raises(UserError) as error:
        load_weights(small_model(), str(tmp_path / "a.pth"))
    assert not (tmp_path / "executed").exists()
    assert "a.pth" in str(error.value)
    if write is write_malicious_plain_pickle:
        pickle.loads((tmp_path / "a.pth").read_bytes())
    else:
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "executed").exists(), "the file would have done it"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "list", "strings"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "a.pth"
    torch.save({"model": small_model().state_dict()}, path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "strings":
        torch.save({"model": {"a": "b"}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth"):
        load_weights(small_model(), str(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 10\n",
            "is a pointer of Git LFS; .* git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page.*; download it again"),
    ],
)
def test_what_came_in_place_of_a_checkpoint_is_told(tmp_path, content, told):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.pth {told}"):
        load_weights(small_model(), str(tmp_path / "a.pth"))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write_atomically({"a": 1}, path)

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_atomically({"a": 2}, path)
    assert read_checkpoint(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


# ---- addresses


def test_checkpoints_come_from_https_too(tmp_path, monkeypatch):
    model = small_model()
    torch.save({"model": model.state_dict()}, tmp_path / "source.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def download(url, to, hash_prefix, progress):
        asked.append((url, hash_prefix))
        os.link(tmp_path / "source.pth", to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    address = "https://example.org/models/r50-0123abcd.pth"
    for _ in range(2):
        assert not load_weights(small_model("--seed", "1"), address).missing
    assert asked == [(address, "0123abcd")], "once, and with the digest in its name"


def test_an_address_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"example\.org.*no route to host.*give its path"):
        load_weights(small_model(), "https://example.org/a.pth")


def test_a_new_run_that_failed_at_its_start_does_not_go_on_with_the_one_before(tmp_path):
    """A launcher starts it again; what lies in the folder is still the earlier run's."""
    write_coco(tmp_path / "data", 4, 2)
    out = tmp_path / "out"
    flags = (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--num_workers",
        "0",
        "--epochs",
        "1",
        "--output_dir",
        str(out),
    )
    assert run_main_forked(*flags).returncode == 0
    earlier = (out / "log.txt").read_text()
    assert (
        run_main_forked(*flags, "--lr", "1e-5", "--batch_size", "9").returncode == 2
    )  # too few images for that

    result = run_main_forked(*flags, "--lr", "1e-5", env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert result.returncode == 0, result.stderr
    assert (out / "earlier-1" / "log.txt").read_text() == earlier
    assert read_checkpoint(out / "checkpoint.pth")["args"]["lr"] == 1e-5

    result = run_main_forked(
        *flags, "--lr", "1e-5", env={"TORCHELASTIC_RESTART_COUNT": "1"}
    )  # this one had begun
    assert "nothing is left to do" in result.stdout
    assert not (out / "earlier-2").exists()
