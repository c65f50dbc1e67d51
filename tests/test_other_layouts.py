"""Checkpoints as other programs and other people leave them: loaded, or refused with a line that
says what the file is.
"""

from __future__ import annotations

import json
import logging
from functools import cache

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from models import build_model, load_detector, load_model
from models.weights.hugging_face import read_hugging_face, write_hugging_face
from tests.golden import recipe
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from tools.convert_checkpoint import convert
from util.checkpoint import read_checkpoint, weights_of
from util.class_map import Category, ClassMap
from util.config import parse_config, with_classes
from util.errors import UserError
from util.other_layouts import in_our_layout

CLASSES = ClassMap(3, (Category(0, 1, "one"), Category(1, 2, "two"), Category(2, 3, "three")))
UNTOLD = {"nheads": 4}  # weights do not tell it


@cache
def trained(*flags: str):
    config = with_classes(
        parse_config([*SMALL_MODEL, "--num_classes", "auto", *SMALL_IMAGES, *flags]), CLASSES
    )
    model = build_model(config)[0].eval()
    recipe.fill(model)
    return model, config


def state(*flags: str) -> dict[str, torch.Tensor]:
    return dict(trained(*flags)[0].state_dict())


def averaged() -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in state().items()}


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


LAYOUTS = {
    "nothing but weights": lambda s: s,
    "DistributedDataParallel": lambda s: {"model": under("module.", s)},
    "torch.compile, in DistributedDataParallel": lambda s: under("module._orig_mod.", s),
    "Lightning": lambda s: {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**under("model.", s), "criterion.w": torch.ones(3)},
        "hyper_parameters": {"lr": 1e-4},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "Lightning, a detector in a module": lambda s: {"state_dict": under("net.detector.", s), "callbacks": {}},
    "mmcv": lambda s: {"meta": {"epoch": 12, "CLASSES": ["a"]}, "state_dict": s, "optimizer": {}},
    "a segmentation model of DETR's code": lambda s: {
        "model": {**under("detr.", s), "mask_head.lay1.weight": torch.ones(2)}
    },
    "DeepSpeed": lambda s: {"module": s, "ds_version": "0.14"},
    "other entries": lambda s: {"epoch": 1, "checkpoint": {"model_state_dict": under("module.", s)}},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_weights_are_found_wherever_they_are(tmp_path, layout):
    torch.save(layout(state()), tmp_path / "a.pth")
    model, _, _, config = load_model(tmp_path / "a.pth", **UNTOLD)
    assert model.state_dict().keys() == state().keys()
    assert all(torch.equal(tensor, state()[name]) for name, tensor in model.state_dict().items())
    assert config.transformer.enc_layers == 2


AVERAGES = {
    "timm": lambda s, e: {"state_dict": s, "state_dict_ema": e},
    "a dict beside": lambda s, e: {"model": s, "model_ema": e},
    "with a count": lambda s, e: {"model": s, "ema": {"module": e, "updates": 7}},
    "in the same dict": lambda s, e: {"state_dict": {**under("model.", s), **under("ema_model.module.", e)}},
    "teacher and student": lambda s, e: {"teacher": e, "student": s},
}


@pytest.mark.parametrize("layout", AVERAGES.values(), ids=list(AVERAGES))
def test_averaged_weights_are_told_from_the_others(tmp_path, layout):
    torch.save(layout(state(), averaged()), tmp_path / "a.pth")
    content = read_checkpoint(tmp_path / "a.pth")
    name = "class_embed.0.bias"
    assert torch.equal(weights_of(content, "a")[name], state()[name])
    assert torch.equal(weights_of(content["ema"], "a")[name], averaged()[name])
    for weights, wanted in (("auto", averaged()), ("model", state())):
        assert torch.equal(
            load_model(tmp_path / "a.pth", weights=weights, **UNTOLD).model.state_dict()[name], wanted[name]
        )


def test_averaged_weights_alone_are_the_weights(tmp_path):
    torch.save({"ema": {"module": averaged()}, "epoch": 3}, tmp_path / "a.pth")
    content = read_checkpoint(tmp_path / "a.pth")
    assert "ema" not in content
    assert torch.equal(content["model"]["class_embed.0.bias"], averaged()["class_embed.0.bias"])


def test_what_is_taken_of_several_is_said(caplog):
    with caplog.at_level(logging.INFO):
        in_our_layout({"a": under("x.", state()), "b": averaged()}, "a.pth")
    assert caplog.messages == ["a.pth: the weights of a under 'x.' are taken; there are also b"]


def test_our_own_layout_stays_as_it_is():
    for content in ({"model": state(), "ema": {"model": averaged(), "updates": 3}, "processes": []}, state()):
        assert in_our_layout(content, "a.pth") is content


# ---- what is no Deformable DETR

OTHERS = {
    "MMDetection": (
        {
            "meta": {},
            "state_dict": {
                "backbone.conv1.weight": torch.ones(1),
                "bbox_head.cls_branches.0.weight": torch.ones(1),
            },
        },
        "it holds a detector of MMDetection",
    ),
    "a ResNet": (
        torchvision.models.resnet18().state_dict(),
        "it holds a ResNet; --backbone_weights takes it",
    ),
    "DETR": (
        {"model": {"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.ones(1)}},
        "attention is not deformable",
    ),
    "transformers, without its folder": (
        {"model.backbone.conv_encoder.model.conv1.weight": torch.ones(1)},
        "its config.json",
    ),
    "Faster R-CNN": ({"model": {"roi_heads.box_head.fc6.weight": torch.ones(1)}}, "a two-stage detector"),
    "anything else": ({"model": {"layer.weight": torch.ones(1)}}, "it has no 'transformer.level_embed'"),
}


@pytest.mark.parametrize(("content", "told"), OTHERS.values(), ids=list(OTHERS))
def test_other_files_are_refused_with_what_they_are(tmp_path, content, told):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        load_detector(tmp_path / "a.pth", device="cpu")
    assert str(error.value).startswith(
        f"--resume {tmp_path / 'a.pth'} holds no Deformable DETR under the published names: "
    )
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# ---- parts that somebody has removed


def without(*parts: str, flags: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state(*flags).items() if not any(part in name for part in parts)}


REMOVED = {
    "class heads": (("class_embed",), "class heads: initialised; the checkpoint has none\n"),
    "all heads": (
        ("class_embed", "bbox_embed"),
        "class heads, box heads: initialised; the checkpoint has none\n",
    ),
    "heads and queries": (
        ("_embed.",),
        "class heads, box heads, queries: initialised; the checkpoint has none\n",
    ),
}


@pytest.mark.parametrize("with_flags", [True, False], ids=["args", "weights alone"])
@pytest.mark.parametrize(("parts", "told"), REMOVED.values(), ids=list(REMOVED))
def test_a_training_starts_from_a_checkpoint_without_heads(tmp_path, parts, told, with_flags):
    write_coco(tmp_path / "data", num_train=2, num_val=1)
    kept = {name: tensor for name, tensor in without(*parts).items() if name != "transformer.level_embed"}
    kept["transformer.level_embed"] = state()["transformer.level_embed"]
    args = {"args": trained()[1].flags()} if with_flags else {}
    torch.save({"model": kept, **args}, tmp_path / "a.pth")
    result = run_main_forked(
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        "--finetune",
        str(tmp_path / "a.pth"),
        "--epochs",
        "1",
        "--lr",
        "0",
        "--lr_backbone",
        "0",
        "--nheads",
        "4",
        "--output_dir",
        str(tmp_path / "out"),
        "--num_workers",
        "0",
    )
    assert result.returncode == 0, result.stderr
    assert told in result.stdout
    saved = read_checkpoint(tmp_path / "out/checkpoint.pth")["model"]
    assert saved["class_embed.0.weight"].shape == (3, 64)
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())


def test_a_checkpoint_without_heads_detects_nothing(tmp_path):
    torch.save({"model": without("class_embed"), "args": trained()[1].flags()}, tmp_path / "a.pth")
    for load in (load_detector, load_model):
        with pytest.raises(UserError, match=r"has no class_embed\.\*.* use --finetune"):
            load(tmp_path / "a.pth")
    result = run_main_forked("--resume", str(tmp_path / "a.pth"), "--eval")
    assert result.returncode == 2
    assert "has no class_embed.*" in result.stderr


def test_a_part_of_the_heads_is_another_architecture(tmp_path):
    flags = ("--with_box_refine",)
    torch.save(
        {"model": without("class_embed.1", flags=flags), "args": trained(*flags)[1].flags()},
        tmp_path / "a.pth",
    )
    with pytest.raises(UserError, match=r"has no class_embed\.1\.weight"):
        load_model(tmp_path / "a.pth", classes=CLASSES)


# ---- Hugging Face's folders

FROZEN = ("--backbone_norm", "frozen_bn")


@pytest.fixture
def folder(tmp_path):
    model, config = trained(*FROZEN)
    write_hugging_face(model.state_dict(), config, CLASSES, tmp_path / "folder")
    return tmp_path / "folder"


def in_parts(folder, suffix: str, save) -> list[str]:
    """The weights of a folder in three files and an index."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-{i + 1:05}-of-00003.{suffix}" for i in range(3)]
    places = {name: files[i % 3] for i, name in enumerate(sorted(weights))}
    for file in files:
        save({name: weights[name] for name in weights if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}{'.safetensors' if suffix == 'safetensors' else '.bin'}.index.json").write_text(
        json.dumps(index)
    )
    return files


@pytest.mark.parametrize(
    ("suffix", "save"), [("safetensors", save_file), ("bin", torch.save)], ids=["safetensors", "bin"]
)
def test_weights_in_several_files_are_put_together(folder, suffix, save):
    files = in_parts(folder, suffix, save)
    index = next(folder.glob("*.index.json"))
    for source in (folder, index, folder / files[1], folder / "config.json"):
        model, _, _, config = load_model(source)
        assert all(
            torch.equal(tensor, state(*FROZEN)[name]) for name, tensor in model.state_dict().items()
        ), source
        assert config.classes == CLASSES


def test_an_index_that_lies_is_told(folder):
    files = in_parts(folder, "safetensors", save_file)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (folder / files[2]).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=rf"{files[2]}, which is not there: download all 3 files"):
        load_model(folder)
    for name in ("../model-00001-of-00003.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "x": name}}))
        with pytest.raises(UserError, match="weight_map must map tensors to files beside it"):
            load_model(folder)
    (folder / "elsewhere").rename(folder / files[2])
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "lost": files[0]}}))
    with pytest.raises(UserError, match=f"{files[0]} is damaged: it does not have the tensor lost"):
        load_model(folder)


def test_a_single_older_file_is_as_good_as_its_folder(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for source in (folder, folder / "pytorch_model.bin"):
        assert torch.equal(
            load_model(source).model.state_dict()["query_embed.weight"], state(*FROZEN)["query_embed.weight"]
        )


def test_safetensors_of_another_trainer_need_no_config(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in under("module.", state()).items()}
    (tmp_path / "saved").mkdir()
    save_file(tensors, tmp_path / "saved/model.safetensors")
    for source in (tmp_path / "saved", tmp_path / "saved/model.safetensors"):
        model = load_model(source, **UNTOLD).model
        assert all(torch.equal(tensor, state()[name]) for name, tensor in model.state_dict().items())
    convert(str(source), tmp_path / "a.pth", **UNTOLD)
    assert torch.equal(
        read_checkpoint(tmp_path / "a.pth")["model"]["query_embed.weight"], state()["query_embed.weight"]
    )


def test_a_model_of_transformers_without_heads_starts_a_training(folder):
    """As DeformableDetrModel is saved: no prefix, no heads."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    base = {
        name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")
    }
    save_file(base, folder / "model.safetensors")
    content = read_hugging_face(str(folder), "--finetune")
    assert "class_embed.0.bias" not in content["model"]
    model = load_model(folder, classes=CLASSES).model
    kept = {
        name: tensor
        for name, tensor in state(*FROZEN).items()
        if "class_embed" not in name and "bbox_embed" not in name
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    with pytest.raises(UserError, match=r"has no class_embed\.\* and no bbox_embed\.\*"):
        load_detector(folder)


def test_evaluation_takes_a_folder_of_hugging_faces(folder, tmp_path):
    write_coco(tmp_path / "data", num_train=1, num_val=1)
    result = run_main_forked("--resume", str(folder), "--eval", "--coco_path", str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    assert "--eval_size 64 --max_size 96\n" in result.stdout, "those of its preprocessor_config.json"
    assert "AP50" in result.stdout
