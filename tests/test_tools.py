"""The programs beside main.py, as a user starts them."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, run, write_coco


def test_operator_self_test_fails_when_the_operator_is_wrong(monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "models/ops"))
    import importlib.util

    spec = importlib.util.spec_from_file_location("ops_test", ROOT / "models/ops/test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    right = module.ms_deform_attn
    monkeypatch.setattr(
        module, "ms_deform_attn", lambda *args, **options: right(*args, **options) * (1 + 1e-3)
    )
    assert module.main() == 1
    assert "False" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("inference",), ("train", *BATCHFORMER), ()])
def test_benchmark_with_a_size(flags):
    result = run(
        sys.executable,
        "benchmark.py",
        *flags,
        *SMALL_MODEL,
        "--num_iters",
        "2",
        "--warm_iters",
        "1",
        "--batch_size",
        "2",
        "--size",
        "64",
        "80",
        "--device",
        "cpu",
    )
    assert result.returncode == 0, result.stderr
    assert "batch 2 of 64 x 80" in result.stdout
    assert "images/s" in result.stdout
    assert ("times as long as --bf 0" in result.stdout) == ("train" in flags)


def test_benchmark_of_the_loader(tmp_path):
    write_coco(tmp_path, num_train=2)
    flags = ("--num_iters", "3", "--warm_iters", "1", "--coco_path", str(tmp_path), *SMALL_IMAGES)
    result = run(sys.executable, "benchmark.py", "loader", *flags)
    assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        assert re.search(rf"^{split}: [\d.]+ ms an image .* mean of 3 ", result.stdout, re.MULTILINE)


def test_benchmark_of_the_operator():
    flags = ("--num_iters", "1", "--size", "64", "80", "--batch", "2", "--device", "cpu")
    result = run(sys.executable, "benchmark.py", "op", *flags)
    assert result.returncode == 0, result.stderr
    for load in (
        "encoder 64 x 80, batch 2, around",
        "decoder 64 x 80, batch 2, from offsets",
        "batch 2, scattered",
    ):
        assert load in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("    reference")]
    assert rows
    assert all(row[3] == row[6] == "1.0x" and row[8] == "MiB" for row in rows)


def test_benchmark_against_the_plain_operator():
    flags = (
        "--num_iters",
        "1",
        "--warm_iters",
        "0",
        "--size",
        "64",
        "80",
        "--device",
        "cpu",
        "--against_reference",
        "--profile",
    )
    for what in ("inference", "train"):
        result = run(
            sys.executable, "benchmark.py", what, *SMALL_MODEL, *flags, env={"MS_DEFORM_ATTN_BACKEND": ""}
        )
        assert result.returncode == 0, result.stderr
        assert "of the time that it takes with the operator in plain PyTorch" in result.stdout
        assert "aten::" in result.stdout, "the profile"


def test_benchmark_on_a_data_set_with_a_checkpoint(tmp_path):
    from models import build_model
    from util.config import parse_config

    write_coco(tmp_path / "data", num_train=1)
    torch.save({"model": build_model(parse_config([*SMALL_MODEL]))[0].state_dict()}, tmp_path / "w.pth")
    flags = (
        "--num_iters",
        "1",
        "--warm_iters",
        "0",
        "--batch_size",
        "1",
        "--resume",
        str(tmp_path / "w.pth"),
        *SMALL_MODEL,
    )
    result = run(sys.executable, "benchmark.py", *flags, *SMALL_IMAGES, "--coco_path", str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert "batch 1 of 64 x 85" in result.stdout
    result = run(sys.executable, "benchmark.py", *flags, "--coco_path", str(tmp_path / "none"))
    assert result.returncode == 2
    assert "--size" in result.stderr


def test_subset_holds_the_first_fitting_images(tmp_path):
    boxes = {i: [{"bbox": [1, 1, 9, 9], "category_id": 1}] * n for i, n in enumerate((3, 0, 1, 2, 5))}
    write_coco(tmp_path / "data", num_train=5, annotations=boxes)
    folders = ("--coco_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"))
    command = (sys.executable, "tools/subset_coco.py", *folders)
    result = run(*command, "--num_images", "2", "--max_objects", "2")
    assert result.returncode == 0, result.stderr
    for split in ("train2017", "val2017"):
        content = json.loads((tmp_path / "out/annotations" / f"instances_{split}.json").read_text())
        assert [image["id"] for image in content["images"]] == [12, 13]
        assert len(content["annotations"]) == 3
        assert sorted(p.name for p in (tmp_path / "out" / split).iterdir()) == ["000002.png", "000003.png"]
    result = run(*command, "--num_images", "9")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_a_subset_of_classes_keeps_ids_and_both_parts(tmp_path):
    boxes = {
        0: [{"bbox": [1, 1, 9, 9], "category_id": c} for c in (1, 3)],
        1: [{"bbox": [1, 1, 9, 9], "category_id": 2}],
    }
    write_coco(tmp_path / "data", num_train=3, num_val=1, annotations=boxes)
    command = (
        sys.executable,
        "tools/subset_coco.py",
        "--coco_path",
        str(tmp_path / "data"),
        "--split",
        "both",
    )
    for flags, images in (
        ((), {"train": [10, 11, 12], "val": [10]}),
        (("--drop_empty",), {"train": [10], "val": [10]}),
    ):
        out = tmp_path / f"out{len(flags)}"
        result = run(
            *command, "--classes", "three", "one", "--images", "link", "--output_dir", str(out), *flags
        )
        assert result.returncode == 0, result.stderr
        for split in ("train", "val"):
            content = json.loads((out / "annotations" / f"instances_{split}2017.json").read_text())
            assert [image["id"] for image in content["images"]] == images[split]
            assert [category["id"] for category in content["categories"]] == [1, 3]
            assert [annotation["category_id"] for annotation in content["annotations"]] == [1, 3]
            assert (out / f"{split}2017/000000.png").samefile(tmp_path / f"data/{split}2017/000000.png")
    result = run(*command, "--classes", "four", "--output_dir", str(tmp_path / "none"))
    assert result.returncode == 2
    assert "'four' is no category; there are one, two, three" in result.stderr


@pytest.mark.parametrize("tool", ["tools/overfit.sh", "tools/dev/check_distributed.sh"])
def test_checks_say_how_they_are_used(tool):
    result = run(f"./{tool}")
    assert result.returncode == 2
    assert "usage" in result.stderr


def test_overfit_command_on_real_images(tiny_coco, tmp_path):
    """The documented command, two epochs of it."""
    out = str(tmp_path / "out")
    result = run(
        "./tools/overfit.sh", str(tiny_coco), "--epochs", "2", "--lr_drop_epochs", "1", "--output_dir", out
    )
    assert result.returncode == 0, result.stderr
    assert "8 images with" in result.stdout
    assert "AP50" in result.stdout


def test_main_trains_on_real_images_with_published_transforms(tiny_coco, tmp_path):
    """COCO's 91 ids, crops, two streams; small sizes and few layers."""
    result = run(
        sys.executable,
        "main.py",
        "--coco_path",
        str(tiny_coco),
        "--backbone",
        "resnet18",
        "--backbone_weights",
        "none",
        "--backbone_norm",
        "gn",
        "--hidden_dim",
        "64",
        "--enc_layers",
        "1",
        "--dec_layers",
        "1",
        "--num_queries",
        "20",
        "--train_sizes",
        "64",
        "96",
        "--eval_size",
        "64",
        "--max_size",
        "128",
        "--crop_resize_sizes",
        "96",
        "--crop_sizes",
        "48",
        "96",
        *BATCHFORMER,
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert result.returncode == 0, result.stderr
    line = json.loads((tmp_path / "out/log.txt").read_text())
    assert len(line["test_coco_eval_bbox"]) == 12
    assert line["train_loss"] > 0
