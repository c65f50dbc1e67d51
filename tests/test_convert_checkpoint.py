"""tools/convert_checkpoint.py: there and back is the identity, and transformers computes what we
compute.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import build_model, load_detector
from models.weights.hugging_face import read_hugging_face
from models.weights.load import choose_weights
from tests.golden import recipe
from tests.helpers import ROOT
from tests.processes import run_forked
from util.checkpoint import load_weights, read_checkpoint, write_atomically
from util.class_map import COCO_CLASSES, Category, ClassMap, classes_of
from util.config import Config, parse_config
from util.errors import UserError
from util.nested_tensor import NestedTensor

sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint

SMALL = (
    "--backbone",
    "resnet18",
    "--backbone_weights",
    "none",
    "--hidden_dim",
    "64",
    "--nheads",
    "4",
    "--enc_layers",
    "2",
    "--dec_layers",
    "3",
    "--dim_feedforward",
    "96",
    "--num_queries",
    "12",
    "--num_classes",
    "5",
)
CLASSES = ClassMap(5, (Category(0, 3, "cat"), Category(2, 17, "hot dog"), Category(4, 1000, "Zebra")))
PLAIN = ()
REFINED = ("--with_box_refine",)
TWO_STAGE = ("--with_box_refine", "--two_stage")
SINGLE_SCALE = (
    "--num_feature_levels",
    "1",
    "--backbone",
    "resnet50",
    "--dilation",
    "--position_embedding",
    "learned",
)
OTHER_SIZES = (*REFINED, "--num_feature_levels", "3", "--enc_n_points", "2", "--dec_n_points", "3")
BATCHFORMER = ("--bf", "1", "--share_bf", "0", "--insert_idx", "0", "1")
VARIANTS = {
    "plain": PLAIN,
    "refined, other sizes": OTHER_SIZES,
    "two-stage": TWO_STAGE,
    "single scale, DC5": SINGLE_SCALE,
}


@functools.cache
def detector(*flags):
    config = parse_config([*SMALL, *flags])
    model = build_model(config)[0].eval()
    recipe.fill(model)
    return model, config


def checkpoint_of(model, config, classes=CLASSES):
    return {"model": model.state_dict(), "args": config.flags(), "classes": classes.to_plain()}


def convert(source, target, *flags):
    convert_checkpoint.main([str(source), str(target), *flags])


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def file(tmp_path):
    """Writes a detector as a run does and gives the path."""

    def write(*flags, **entries):
        write_atomically({**checkpoint_of(*detector(*flags)), **entries}, tmp_path / "a.pth")
        return tmp_path / "a.pth"

    return write


# ---- there and back


@pytest.mark.parametrize("flags", [*VARIANTS.values(), BATCHFORMER], ids=[*VARIANTS, "BatchFormerV2"])
def test_there_and_back_is_the_identity(tmp_path, file, flags):
    before = read_checkpoint(file(*flags))
    convert(tmp_path / "a.pth", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "b.pth")
    after = read_checkpoint(tmp_path / "b.pth")
    require_equal(after["model"], before["model"])
    assert after["classes"] == before["classes"]
    assert after["args"] == {**before["args"], "backbone_weights": "imagenet"}, (
        "but for where a run's first weights came from"
    )


def test_a_file_of_a_folder_loads_evaluates_and_fits_its_own_flags(tmp_path, file):
    convert(file(*TWO_STAGE), tmp_path / "folder")
    convert(tmp_path / "folder" / "model.safetensors", tmp_path / "b.pth")
    model = build_model(
        Config().with_flags({**read_checkpoint(tmp_path / "b.pth")["args"], "backbone_weights": "none"})
    )[0]
    report = load_weights(model, str(tmp_path / "b.pth"))
    assert (report.missing, report.unexpected) == ((), ())


def test_a_folder_predicts_as_the_file_does(tmp_path, file):
    convert(file(*REFINED), tmp_path / "folder")
    image = (recipe.images([(96, 128)])[0] * 50 + 128).clamp(0, 255).to(torch.uint8)
    expected, found = (load_detector(tmp_path / name, device="cpu")(image) for name in ("a.pth", "folder"))
    assert len(found.names) > 0
    assert found.names == expected.names
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.category_ids, expected.category_ids)


def test_a_published_file_needs_no_more_than_it_holds(tmp_path):
    """Namespace, names of DistributedDataParallel, aliases, COCO's 91 logits without a word about
    them.
    """
    model, config = detector(*REFINED, "--num_classes", "91")
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    aliases = {
        f"module.transformer.decoder.{n}": t
        for n, t in model.state_dict().items()
        if n.startswith("bbox_embed.")
    }
    args = argparse.Namespace(
        **{**config.flags(), "frozen_weights": None, "lr_drop_epochs": None, "device": "cuda"}
    )
    torch.save({"model": state | aliases, "args": args, "epoch": 49}, tmp_path / "published.pth")
    convert(tmp_path / "published.pth", tmp_path / "folder")
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (written["id2label"]["1"], written["id2label"]["90"], written["id2label"]["12"]) == (
        "person",
        "toothbrush",
        "N/A",
    )
    assert len(written["id2label"]) == 91
    back = read_hugging_face(str(tmp_path / "folder"), "source")
    require_equal(back["model"], model.state_dict())
    assert classes_of(back, "") == COCO_CLASSES


def test_weights_alone_need_what_they_do_not_tell(tmp_path):
    model, _ = detector(*REFINED, "--dilation", "--backbone", "resnet50")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "folder", "--nheads", "4", "--dilation")
    back = read_hugging_face(str(tmp_path / "folder"), "source")
    require_equal(back["model"], model.state_dict())
    assert [back["args"][name] for name in ("nheads", "dilation", "enc_n_points", "with_box_refine")] == [
        4,
        True,
        4,
        True,
    ]
    assert "classes" not in back, "nobody knows their names"


def test_averaged_weights_are_taken_unless_they_were_worse():
    model, averaged = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    lines = [
        json.dumps({"test_coco_eval_bbox": [0.3], "test_ema_coco_eval_bbox": [0.2]}),
        json.dumps({"epoch": 1}),
    ]
    run = {"model": model, "ema": {"model": averaged, "updates": 7}}
    for checkpoint, asked, which in (
        (run, "auto", "ema"),
        (run, "model", "model"),
        ({**run, "history": {"lines": lines}}, "auto", "model"),
        ({**run, "history": {"lines": lines}}, "ema", "ema"),
        ({**run, "history": {"lines": lines[1:]}}, "auto", "ema"),
        ({"model": model}, "auto", "model"),
    ):
        weights, found = choose_weights(checkpoint, "a.pth", "source", asked)
        assert found == which
        assert torch.equal(weights["a"], (averaged if which == "ema" else model)["a"])
    with pytest.raises(UserError, match="--ema_decay"):
        choose_weights({"model": model}, "a.pth", "source", "ema")


def test_running_statistics_are_frozen_and_their_counts_left_out(tmp_path, file, capsys, caplog):
    caplog.set_level("INFO")
    path = file("--backbone_norm", "bn")
    convert(path, tmp_path / "folder")
    assert "counts of batch normalisation are left out" in caplog.text
    back = read_hugging_face(str(tmp_path / "folder"), "source")
    kept = {n: t for n, t in read_checkpoint(path)["model"].items() if not n.endswith("num_batches_tracked")}
    require_equal(back["model"], kept)


def test_the_tool_by_its_command_line(tmp_path, file):
    path, folder = str(file(ema={"model": {"a": torch.zeros(1)}})), str(tmp_path / "folder")
    refused = run_forked("tools/convert_checkpoint.py", path, folder)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "holds no Deformable DETR" in refused.stderr
    done = run_forked("tools/convert_checkpoint.py", path, folder, "--weights", "model")
    assert done.returncode == 0, done.stderr
    assert f"{folder}: weights" in done.stdout
    require_equal(read_hugging_face(folder, "source")["model"], detector()[0].state_dict())
    shown = run_forked("tools/convert_checkpoint.py", "--help")
    assert "example:" in shown.stdout
    assert "default: auto" in " ".join(shown.stdout.split())


# ---- other writers' files


def test_names_of_transformers_5_and_heads_that_are_there_once(tmp_path, file):
    convert(file(), tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    newer = {
        name.replace(".conv_encoder.model.", ".model.")
        .replace(".out_proj.", ".o_proj.")
        .replace(".fc", ".mlp.fc"): tensor
        for name, tensor in weights.items()
        if not name.startswith(("class_embed.1", "class_embed.2", "bbox_embed.1", "bbox_embed.2"))
    }
    save_file(newer, tmp_path / "folder" / "model.safetensors")
    require_equal(read_hugging_face(str(tmp_path / "folder"), "source")["model"], detector()[0].state_dict())


def test_refined_heads_under_one_of_their_two_names(tmp_path, file):
    for kept, dropped in (
        ("bbox_embed.", "model.decoder.bbox_embed."),
        ("model.decoder.bbox_embed.", "bbox_embed."),
    ):
        folder = tmp_path / dropped
        convert(file(*REFINED), folder)
        weights = load_file(folder / "model.safetensors")
        assert any(name.startswith(kept) for name in weights)
        save_file(
            {n: t for n, t in weights.items() if not n.startswith(dropped)}, folder / "model.safetensors"
        )
        require_equal(read_hugging_face(str(folder), "source")["model"], detector(*REFINED)[0].state_dict())


def test_a_folder_with_the_older_kind_of_file(tmp_path, file):
    convert(file(), tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "folder" / "pytorch_model.bin")
    require_equal(read_hugging_face(str(tmp_path / "folder"), "source")["model"], detector()[0].state_dict())


def test_the_config_of_the_hubs_first_models(tmp_path, file):
    """No ids, names that nobody gave, defaults left out, the backbone's name with a tag."""
    convert(file(), tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    small = {name: config[name] for name in config if "layers" in name or "ffn" in name or "heads" in name}
    config = {
        "model_type": "deformable_detr",
        **small,
        "d_model": 64,
        "num_queries": 12,
        "backbone": "resnet18.a1_in1k",
    }
    path.write_text(json.dumps({**config, "id2label": {str(label): f"LABEL_{label}" for label in range(5)}}))
    back = read_hugging_face(str(tmp_path / "folder"), "source")
    assert "classes" not in back
    assert (back["args"]["backbone"], back["args"]["num_classes"], back["args"]["enc_n_points"]) == (
        "resnet18",
        5,
        4,
    )
    path.write_text(json.dumps({**config, "id2label": {"0": "N/A", "1": "cat"}}))
    assert classes_of(read_hugging_face(str(tmp_path / "folder"), ""), "") == ClassMap(
        5, (Category(1, 1, "cat"),)
    )


def test_models_come_from_the_hub_by_their_page_and_their_file(tmp_path, file, monkeypatch):
    convert(file(), tmp_path / "folder")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def download(url, to, *_, **__):
        asked.append(url)
        (tmp_path / "folder" / url.rpartition("/")[2]).rename(to)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    base = "https://huggingface.co/owner/name"
    for source in (
        base,
        f"{base}/",
        f"{base}/resolve/main/model.safetensors",
        f"{base}/blob/main/model.safetensors",
    ):
        require_equal(read_hugging_face(source, "--finetune")["model"], detector()[0].state_dict())
    assert asked == [f"{base}/resolve/main/config.json", f"{base}/resolve/main/model.safetensors"], (
        "fetched once"
    )


# ---- what can't be converted


def edited(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


MISTAKES = {
    "another model": (lambda f: edited(f, model_type="detr"), "no Deformable DETR"),
    "another backbone": (lambda f: edited(f, backbone="swin_tiny"), "swin_tiny"),
    "transformers' own ResNet": (
        lambda f: edited(f, backbone_config={"model_type": "resnet"}),
        "its backbone is",
    ),
    "two numbers of heads": (lambda f: edited(f, decoder_attention_heads=8), "--nheads"),
    "no number": (lambda f: edited(f, d_model="wide"), "can't be used"),
    "names that are none": (lambda f: edited(f, id2label={"a": 1}), "id2label"),
    "too few layers": (lambda f: edited(f, encoder_layers=1), "--enc_layers"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "half the weights": (lambda f: cut(f / "model.safetensors"), "damaged"),
    "no heads": (lambda f: without(f, "class_embed"), "class_embed"),
    "no values": (lambda f: without(f, "model.decoder.layers.1.self_attn.v_proj.bias"), "in_proj_bias"),
}


def without(folder, start):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith(start)},
        folder / "model.safetensors",
    )


def cut(path):
    content = path.read_bytes()[:999]
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    write_atomically(checkpoint_of(*detector()), folder / "a.pth")
    convert(folder / "a.pth", folder / "folder")
    return folder / "folder"


def copy(source, target):
    """The weights by a link, which is quicker."""
    os.link(source, target) if source.endswith(".safetensors") else shutil.copy(source, target)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_folders_that_are_none_are_refused_by_name(tmp_path, converted, mistake):
    spoil, told = MISTAKES[mistake]
    shutil.copytree(converted, tmp_path / "folder", copy_function=copy)
    spoil(tmp_path / "folder")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "folder", tmp_path / "b.pth")
    assert told in str(error.value)
    assert "folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "b.pth").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--backbone_norm", "gn"), "gn"),
        (("--position_embedding_scale", "3"), "--position_embedding_scale 3"),
        ((*BATCHFORMER, "--eval_bf"), "--eval_bf"),
    ],
)
def test_what_transformers_can_not_compute_is_refused(tmp_path, file, flags, told):
    with pytest.raises(UserError, match=told):
        convert(file(*flags), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_target_says_what_it_is(tmp_path, file):
    with pytest.raises(UserError, match=r"b\.pth.*a folder"):
        convert(file(), tmp_path / "b.pth")
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "a.pth", tmp_path)
    convert(tmp_path / "a.pth", tmp_path / "folder")
    with pytest.raises(UserError, match=r"a \.pth file"):
        convert(tmp_path / "folder", tmp_path / "other")


def test_resuming_from_a_folder_tells_how_to_convert_it(converted):
    for source in (converted, converted / "model.safetensors"):
        with pytest.raises(UserError, match="--resume.*tools/convert_checkpoint.py"):
            read_checkpoint(source)


# ---- transformers itself


class TorchvisionBackbone(nn.Module):
    """Stands in for timm's ResNet, whose names and outputs are torchvision's, where timm is
    missing.
    """

    def __init__(self, config):
        super().__init__()
        from models.backbone import build_body

        given = config.backbone_config
        multi_scale = len(given.out_indices) > 1
        dilation = given.output_stride == 16
        self._backbone = build_body(given.backbone, "bn", "none", dilation=dilation, multi_scale=multi_scale)
        self.channels = self._backbone.channels


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=list(VARIANTS))
def test_transformers_gives_our_outputs(tmp_path, file, flags, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5")
    if not transformers.utils.is_timm_available():
        from transformers.models.deformable_detr import modeling_deformable_detr

        monkeypatch.setattr(modeling_deformable_detr, "load_backbone", TorchvisionBackbone)
    convert(file(*flags), tmp_path / "folder")
    theirs, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert theirs.config.id2label == {0: "cat", 1: "N/A", 2: "hot dog", 3: "N/A", 4: "Zebra"}
    images = NestedTensor.from_images(recipe.images([(96, 128), (120, 90)]))
    with torch.no_grad():
        outputs = detector(*flags)[0](images)
        found = theirs.eval()(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
    torch.testing.assert_close(found.logits, outputs["pred_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes, outputs["pred_boxes"], rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "saved")
    back = read_hugging_face(str(tmp_path / "saved"), "source")
    require_equal(back["model"], detector(*flags)[0].state_dict())
    assert classes_of(back, "") == CLASSES
    size = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder").size
    assert (size["shortest_edge"], size["longest_edge"]) == (800, 1333)
