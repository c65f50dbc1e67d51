"""load_model, build_model and README's Python: from a checkpoint or data to what trains and
evaluates.
"""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from datasets import build_dataset
from models import build_model, load_detector, load_model
from models.backbone import Backbone, build_body
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, run, write_coco
from tests.processes import run_main_forked
from tests.test_docs import blocks
from util.class_map import Category, ClassMap
from util.config import parse_config
from util.errors import UserError

NAMED = ClassMap(3, (Category(0, 1, "one"), Category(1, 2, "two"), Category(2, 3, "three")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data and a run with BatchFormerV2 and averaged weights in it."""
    folder = tmp_path_factory.mktemp("trained")
    write_coco(folder / "data", num_train=4, num_val=2)
    result = run_main_forked(
        "--coco_path",
        str(folder / "data"),
        *SMALL_MODEL[:-2],
        *SMALL_IMAGES,
        *BATCHFORMER,
        "--epochs",
        "1",
        "--dropout",
        "0",
        "--output_dir",
        str(folder / "out"),
        "--lr",
        "0.003",
        "--cls_loss_coef",
        "3",
        "--ema_decay",
        "0.5",
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_one_call_gives_all_that_a_training_step_needs(trained):
    model, criterion, postprocessors, config = load_model(trained / "out/checkpoint.pth", weights="model")
    saved = torch.load(trained / "out/checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert config.classes == NAMED
    assert (config.optim.lr, config.data.eval_size, config.data.train_sizes) == (0.003, 64, (48, 64))
    assert criterion.weight_dict["loss_ce"] == 3
    dataset = build_dataset("train", config)
    images, targets = zip(*[dataset[i] for i in range(3)], strict=True)
    outputs = model(list(images))
    assert outputs["num_streams"] == 2
    losses = criterion(outputs, targets)
    total = criterion.total(losses)
    assert total.item() == pytest.approx(
        sum(losses[name].item() * factor for name, factor in criterion.weight_dict.items())
    )
    total.backward()
    assert model.transformer.bf[0].self_attn.in_proj_weight.grad.abs().sum() > 0
    found = postprocessors["bbox"](model.eval()(images[:1]), targets[0]["orig_size"][None])
    assert found[0]["boxes"].shape == (36, 4)


def test_it_detects_what_load_detector_does(trained):
    path = trained / "out/checkpoint.pth"
    detector = load_detector(path, device="cpu")
    model = load_model(path).model.eval()
    image = detector.prepare(trained / "data/val2017/000000.png")
    with torch.no_grad():
        assert torch.equal(model([image.pixels])["pred_boxes"], detector.outputs([image])["pred_boxes"])


def test_flags_go_before_the_checkpoints(trained):
    path = trained / "out/checkpoint.pth"
    config = load_model(path, coco_path=Path("elsewhere"), lr=1.0, eval_size=50, bf=0, drop_path=0.1).config
    assert (config.data.coco_path, config.optim.lr, config.data.eval_size) == ("elsewhere", 1.0, 50)
    assert config.batchformer.bf == 0
    assert load_model(path, bf=0).model.transformer.bf is None
    with pytest.raises(UserError, match="is of another detector: give --hidden_dim 64"):
        load_model(path, hidden_dim=128)
    for unknown in ("learning_rate", "output_dir", "num_classes"):
        with pytest.raises(UserError, match=f"{unknown} is no flag that load_model takes"):
            load_model(path, **{unknown: 3})


def test_other_classes_take_the_rows_of_their_names(trained):
    path = trained / "out/checkpoint.pth"
    classes = ClassMap(2, (Category(0, 7, "three"), Category(1, 9, "new")))
    before = load_model(path).model.state_dict()["class_embed.0.weight"]
    model, _, _, config = load_model(path, classes=classes)
    after = model.state_dict()["class_embed.0.weight"]
    assert after.shape == (2, 64)
    assert torch.equal(after[0], before[2])
    assert config.classes == classes


def test_labels_are_the_checkpoints_however_the_data_counts(trained, tmp_path):
    """Data with a part of the classes: its own labels would begin at 0."""
    write_coco(tmp_path, 1, annotations={0: [{"bbox": [1, 2, 30, 20], "category_id": 3}]})
    annotations = tmp_path / "annotations/instances_val2017.json"
    annotations.write_text(
        annotations.read_text().replace('{"id": 1, "name": "one"}, {"id": 2, "name": "two"}, ', "")
    )
    config = load_model(trained / "out/checkpoint.pth", coco_path=tmp_path).config
    assert build_dataset("val", config)[0][1]["labels"].tolist() == [2]


def test_a_new_detector_has_the_classes_of_the_data_or_cocos_with_a_warning(trained, caplog):
    config = parse_config(["--coco_path", str(trained / "data"), *SMALL_MODEL[:-2]])
    classes = build_dataset("train", config).classes
    assert build_model(config, classes)[0].state_dict()["class_embed.0.bias"].shape == (3,)
    assert not caplog.records
    assert build_model(config)[0].state_dict()["class_embed.0.bias"].shape == (91,)
    (told,) = caplog.messages
    assert (
        "91 logits of COCO" in told and "build_model(config, build_dataset('train', config).classes)" in told
    )


def test_help_lists_what_the_functions_take():
    for function, options in (
        (load_detector, "score_threshold weights architecture"),
        (load_model, "classes flags"),
    ):
        shown = pydoc.plain(pydoc.render_doc(function))
        assert all(re.search(rf"^ +{option}: ", shown, re.MULTILINE) for option in options.split()), shown
    assert {"build_model", "load_model", "load_detector"} <= set(dir(models))


# ---- a backbone of one's own


class Stages(nn.Module):
    """A body whose stages have names of their own."""

    channels = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Conv2d(3, 8, 32, 32)


def test_a_backbone_that_would_be_frozen_unseen_is_refused():
    stages = ("layer2", "layer3", "layer4")
    with pytest.raises(
        ValueError, match="Stages has no parameter whose name begins with layer2 or layer3 or layer4"
    ):
        Backbone(Stages(), stages)
    assert all(p.requires_grad for p in Backbone(Stages(), ("",)).parameters())
    assert not any(p.requires_grad for p in Backbone(Stages(), ()).parameters())
    body = build_body("resnet18", "bn", "none", dilation=False, multi_scale=True)
    trains = {name for name, p in Backbone(body, stages).named_parameters() if p.requires_grad}
    assert trains
    assert all(name.startswith(("body.layer2", "body.layer3", "body.layer4")) for name in trains)


# ---- Python of README and docs/first_steps.md


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, trained) -> Path:
    """The project with what the quickstart leaves behind, as far as README's Python uses it."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("models", "datasets", "util"):
        (root / name).symlink_to(ROOT / name)
    made = run(
        "python",
        "-m",
        "datasets.synthetic",
        "--output_dir",
        str(root / "data/synthetic"),
        "--train_images",
        "4",
        "--val_images",
        "2",
        "--num_classes",
        "3",
        "--image_size",
        "64",
    )
    assert made.returncode == 0, made.stderr
    result = run_main_forked(
        "--coco_path",
        str(root / "data/synthetic"),
        *SMALL_MODEL[:-2],
        *SMALL_IMAGES,
        *BATCHFORMER,
        "--epochs",
        "1",
        "--output_dir",
        str(root / "exps/synthetic"),
    )
    assert result.returncode == 0, result.stderr
    return root


@pytest.mark.parametrize("page", ["README.md", "docs/first_steps.md"])
def test_the_pages_python_runs_as_printed_from_any_folder(checkout, tmp_path, page):
    (block,) = blocks(ROOT / page, "python")
    (tmp_path / "script.py").write_text(block)
    result = run(
        "python", "script.py", cwd=tmp_path, env={"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ detections? on \d+ x \d+ pixels|'scores': tensor", result.stdout)
