"""load_detector: any kind of image gives the same detections, those of evaluation; the architecture
comes from the file.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model, load_detector
from models.detector import Detections
from models.weights.architecture import config_of
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from util.class_map import Category, ClassMap
from util.config import parse_config
from util.errors import UserError

# sparse ids, one logit without a category
CLASSES = ClassMap(4, (Category(0, 3, "person"), Category(1, 17, "traffic light"), Category(2, 1000, "dog")))
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@cache
def small_model(*flags: str) -> tuple[torch.nn.Module, dict]:
    """Random weights whose detections differ from each other, and the flags of it."""
    config = parse_config([*SMALL_MODEL, *SMALL_IMAGES, *flags])
    torch.manual_seed(0)
    model = build_model(config)[0].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model, config.flags()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model, flags = small_model()
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "args": flags, "classes": CLASSES.to_plain()}, path)
    return path


@pytest.fixture(scope="module")
def detector(checkpoint):
    return load_detector(checkpoint, device="cpu")


def same(a: Detections, b: Detections) -> bool:
    return a.names == b.names and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels")
    )


# ---- images


def test_what_a_detection_is(detector):
    found = detector(PIXELS)
    assert len(found) == 48, "12 queries x 4 logits, below the 100 that are kept"
    assert found.boxes.shape == (48, 4)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert (found.scores[1:] <= found.scores[:-1]).all(), "best first"
    assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
    assert found.boxes.max() > 2, "pixels"
    assert set(zip(found.labels.tolist(), found.category_ids.tolist(), found.names, strict=True)) == {
        (0, 3, "person"),
        (1, 17, "traffic light"),
        (2, 1000, "dog"),
        (3, 3, "class 3"),
    }
    first = next(iter(found))
    assert first[:3] == (found.names[0], found.scores[0].item(), tuple(found.boxes[0].tolist()))
    assert first[3:] == (found.labels[0], found.category_ids[0])
    assert str(found).splitlines()[0] == "48 detections on 80 x 60 pixels (width x height)"
    assert found.names[0] in str(found).splitlines()[1]


def test_above_keeps_what_scores_enough(detector):
    found = detector(PIXELS)
    limit = found.scores[5].item()
    assert len(found.above(limit)) == (found.scores >= limit).sum() < len(found)
    assert same(found.above(0), found)
    none = found.above(1.1)
    assert len(none) == 0
    assert none.boxes.shape == (0, 4)
    assert list(none) == []


def test_every_kind_of_image_gives_the_same(detector, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    alpha = np.random.default_rng(1).integers(0, 256, (60, 80, 1), dtype=np.uint8)
    images = [
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        Image.fromarray(PIXELS),
        tensor,
        tensor.contiguous(),
        tensor / 255,
        tensor.double() / 255,
        PIXELS / 255,
        (PIXELS / 255).astype(np.float32),
        np.asfortranarray(PIXELS),
        np.concatenate([PIXELS, alpha], 2),
        Image.fromarray(np.concatenate([PIXELS, alpha], 2)),
    ]
    wanted = detector(PIXELS)
    assert all(same(detector(image), wanted) for image in images)
    assert all(same(found, wanted) for found in detector(images))


def test_every_kind_of_grey_image_gives_the_same(detector, tmp_path):
    grey = PIXELS[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(tmp_path / "deep.png")
    wanted = detector(np.repeat(grey[..., None], 3, 2))
    images = [
        grey,
        grey[..., None],
        grey / 255,
        torch.from_numpy(grey)[None],
        Image.fromarray(grey),
        *tmp_path.iterdir(),
    ]
    assert len(images) == 7
    assert all(same(found, wanted) for found in detector(images))


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (PIXELS * 1.0, "[0, 1]"),
        (np.full((8, 8, 3), np.nan), "[0, 1]"),
        (PIXELS.astype(np.int64) - 300, "int64"),
        (PIXELS > 9, "bool"),
        (PIXELS.transpose(2, 0, 1), "[H, W, 3]"),
        (PIXELS[None], "list"),
        (np.zeros((0, 8, 3), np.uint8), "[0, 8, 3]"),
        (torch.from_numpy(PIXELS), "[3, H, W]"),
        (torch.zeros(2, 3, 8, 8), "list"),
        ("no such file.jpg", "no such file.jpg"),
    ],
)
def test_what_is_no_image_is_told_in_a_line(detector, image, told):
    with pytest.raises(UserError) as error:
        detector(image)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_what_could_never_be_an_image(detector):
    with pytest.raises(TypeError, match="NoneType"):
        detector(None)


def test_files_are_taken_upright_and_pictures_as_they_lie(detector, tmp_path):
    upright = Image.fromarray(PIXELS)
    undone = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    wanted = detector(upright)
    for orientation, how in undone.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(how).save(tmp_path / f"{orientation}.png", exif=exif)
        found = detector(tmp_path / f"{orientation}.png")
        assert found.size == (60, 80), orientation
        assert same(found, wanted), orientation
    stored = detector(Image.open(tmp_path / "6.png"))
    assert stored.size == (80, 60)
    assert not same(stored, wanted)


def test_a_batch_is_padded_and_single_images_are_not(checkpoint, detector):
    images = [PIXELS, PIXELS[:, :40], PIXELS[:30]]
    alone = [detector(image) for image in images]
    assert all(same(a, b) for a, b in zip(detector(images), alone, strict=True)), "one at a time by default"
    together = load_detector(checkpoint, device="cpu", batch_size=2)(images)
    assert [found.size for found in together] == [(60, 80), (60, 40), (30, 80)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=0.02, rtol=0)
    assert same(together[2], alone[2]), "the last batch is of one image"
    assert detector([]) == []


def test_a_threshold_for_all(checkpoint, detector):
    limit = detector(PIXELS).scores[7].item()
    assert same(
        load_detector(checkpoint, device="cpu", score_threshold=limit)(PIXELS), detector(PIXELS).above(limit)
    )


def test_mixed_precision_gives_nearly_the_same(checkpoint, detector):
    found = load_detector(checkpoint, device="cpu", amp="bf16")(PIXELS)
    assert not torch.equal(found.scores, detector(PIXELS).scores)
    torch.testing.assert_close(found.scores, detector(PIXELS).scores, atol=0.01, rtol=0)


def test_detections_are_those_of_evaluation(tmp_path):
    """main.py --eval --save_predictions: a batch of two images of different sizes, one padded, and
    a batch of one.
    """
    write_coco(tmp_path / "data", 1, 3)
    Image.fromarray(PIXELS).save(tmp_path / "data/val2017/000001.png")
    model, flags = small_model("--num_classes", "3")
    classes = ClassMap(3, tuple(Category(i, i + 1, name) for i, name in enumerate(("one", "two", "three"))))
    torch.save(
        {"model": model.state_dict(), "args": flags, "classes": classes.to_plain()},
        tmp_path / "checkpoint.pth",
    )
    paths = sorted((tmp_path / "data/val2017").iterdir())
    result = run_main_forked(
        *SMALL_MODEL[:-2],
        *SMALL_IMAGES,
        "--coco_path",
        str(tmp_path / "data"),
        "--eval",
        "--resume",
        str(tmp_path / "checkpoint.pth"),
        "--batch_size",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
        "--save_predictions",
        "--device",
        "cpu",
    )
    assert result.returncode == 0, result.stderr
    evaluated = json.loads((tmp_path / "out/predictions.json").read_text())
    found = load_detector(tmp_path / "checkpoint.pth", device="cpu", batch_size=2)(paths)
    rows = [(10 + i, *row) for i, one in enumerate(found) for row in one]
    assert len(rows) == len(evaluated) == 3 * 36
    for (image_id, _, score, (x0, y0, x1, y1), _, category_id), wanted in zip(rows, evaluated, strict=True):
        assert (image_id, category_id) == (wanted["image_id"], wanted["category_id"])
        assert score == pytest.approx(wanted["score"], abs=1e-6)
        assert [x0, y0, x1 - x0, y1 - y0] == pytest.approx(wanted["bbox"], abs=1e-3)


# ---- checkpoints

ARCHITECTURES = [
    (),
    ("--with_box_refine", "--enc_n_points", "2", "--num_feature_levels", "3"),
    ("--with_box_refine", "--two_stage", "--enc_layers", "1"),
    ("--num_feature_levels", "1", "--position_embedding", "learned", "--dec_layers", "3"),
    ("--backbone_norm", "frozen_bn", "--num_classes", "91"),
    ("--backbone", "resnet34", "--backbone_norm", "bn", "--dec_n_points", "1"),
]


@pytest.mark.parametrize("flags", ARCHITECTURES, ids=lambda flags: " ".join(flags) or "plain")
def test_weights_alone_tell_the_architecture(flags, tmp_path, caplog):
    """What they can't tell is given: 4 heads, the image's size, and in two stages the number of
    queries.
    """
    model, flags_of_it = small_model(*flags)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    given = {
        "nheads": 4,
        "eval_size": 64,
        "max_size": 96,
        **({"num_queries": 12} if "--two_stage" in flags else {}),
    }
    with caplog.at_level(logging.WARNING):
        bare = load_detector(tmp_path / "bare.pth", device="cpu", **given)
    assert "does not say how it was trained" in caplog.text
    for name in (
        "backbone",
        "backbone_norm",
        "with_box_refine",
        "two_stage",
        "enc_layers",
        "dec_layers",
        "dim_feedforward",
        "enc_n_points",
        "dec_n_points",
        "num_feature_levels",
        "position_embedding",
    ):
        assert bare.config.flags()[name] == flags_of_it[name], name
    torch.save({"model": model.state_dict(), "args": flags_of_it}, tmp_path / "full.pth")
    assert same(bare(PIXELS), load_detector(tmp_path / "full.pth", device="cpu")(PIXELS))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ],
)
def test_every_backbone_is_told_by_its_weights(name):
    import torchvision

    with torch.device("meta"):
        body = getattr(torchvision.models, name)()
    small, _ = small_model()
    state = {key: value for key, value in small.state_dict().items() if not key.startswith("backbone.0")}
    state |= {f"backbone.0.body.{key}": torch.empty(value.shape) for key, value in body.state_dict().items()}
    assert config_of({"model": state}, "a file").backbone.backbone == name


def test_a_published_checkpoint_needs_no_flags(tmp_path):
    """Flags in a Namespace with others than ours and no number of classes, aliased names, a head of
    91 and no classes.
    """
    model, flags = small_model("--with_box_refine", "--num_classes", "91")
    state = model.state_dict()
    for part in ("class_embed", "bbox_embed"):
        state |= {f"transformer.decoder.{key}": value for key, value in state.items() if key.startswith(part)}
    names = ("backbone", "nheads", "enc_layers", "dec_layers", "with_box_refine", "num_queries", "lr")
    published = {name: flags[name] for name in names}
    args = argparse.Namespace(
        **published, frozen_weights=None, masks=False, coco_panoptic_path=None, resume="x.pth"
    )
    torch.save({"model": state, "args": args, "epoch": 49, "optimizer": {}}, tmp_path / "published.pth")
    detector = load_detector(tmp_path / "published.pth", device="cpu", eval_size=64, max_size=96)
    found = detector(PIXELS)
    assert same(found, load_detector_of(model, flags, tmp_path)(PIXELS))
    assert {"person", "bicycle", "toothbrush"} <= set(detector.classes.names.values())
    assert found.category_ids.tolist() == found.labels.tolist(), "COCO's own ids"
    assert load_detector(tmp_path / "published.pth", device="cpu").config.data.eval_size == 800


def load_detector_of(model: torch.nn.Module, flags: dict, folder: Path):
    torch.save({"model": model.state_dict(), "args": flags}, folder / "ours.pth")
    return load_detector(folder / "ours.pth", device="cpu")


def test_batchformer_has_no_say_in_prediction(tmp_path):
    model, flags = small_model(*BATCHFORMER)
    detector = load_detector_of(model, flags, tmp_path)
    assert detector.model.transformer.bf is None
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(detector.model(images)["pred_boxes"], model(images)["pred_boxes"])
    model, flags = small_model(*BATCHFORMER, "--eval_bf")
    assert load_detector_of(model, flags, tmp_path).model.transformer.bf is not None, (
        "unless it was to be there in evaluation"
    )


def test_averaged_weights_are_taken_where_there_are_any(checkpoint, tmp_path):
    content = torch.load(checkpoint)
    averaged = {
        name: value * 0.9 if name.startswith("class_embed") else value
        for name, value in content["model"].items()
    }
    torch.save({**content, "ema": {"model": averaged, "updates": 5}}, tmp_path / "both.pth")
    torch.save({**content, "model": averaged}, tmp_path / "averaged.pth")
    wanted = load_detector(tmp_path / "averaged.pth", device="cpu")(PIXELS)
    plain = load_detector(checkpoint, device="cpu")(PIXELS)
    for weights, expected in (("auto", wanted), ("ema", wanted), ("model", plain)):
        assert same(load_detector(tmp_path / "both.pth", device="cpu", weights=weights)(PIXELS), expected), (
            weights
        )
    assert not same(wanted, plain)
    with pytest.raises(UserError, match="no averaged weights"):
        load_detector(checkpoint, weights="ema")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"a": torch.zeros(1)}}, "holds no Deformable DETR"),
        ({"model": 3}, "is no checkpoint"),
        ({"model": {"transformer.level_embed": torch.tensor(1.0)}}, "holds no Deformable DETR"),
        ({"nonsense": "text"}, "no plain tensor"),
    ],
)
def test_a_file_that_holds_no_detector(tmp_path, content, told):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=told) as error:
        load_detector(tmp_path / "other.pth", device="cpu")
    assert "other.pth" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bach_size": 2}, "bach_size"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"score_threshold": 30}, "score_threshold 30"),
        ({"weights": "best"}, "best"),
        ({"amp": "fp8"}, "fp8"),
        ({"device": "toaster"}, "toaster"),
        ({"hidden_dim": 128}, "hidden_dim"),
        ({"backbone": "resnet34"}, "backbone"),
        ({"nheads": 5}, "nheads"),
        ({"eval_size": 800, "max_size": 600}, "max_size 600"),
    ],
)
def test_options_that_can_not_be(checkpoint, options, told):
    with pytest.raises(UserError, match=told) as error:
        load_detector(checkpoint, **{"device": "cpu", **options})
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_is_named():
    with pytest.raises(UserError, match=r"missing\.pth does not exist"):
        load_detector("missing.pth")


def test_the_folder_of_a_run_is_told_which_checkpoint(tmp_path):
    for name in (
        "checkpoint.pth",
        "checkpoint0004.pth",
        "checkpoint_best.pth",
        "eval.pth",
        "resume_0001_000000000.pth",
    ):
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"is a folder; name a checkpoint in it, such as \S+/checkpoint_best\.pth$"
    ):
        load_detector(tmp_path)


def test_importing_the_package_loads_nothing():
    """So models.ops works with torch alone, whatever load_detector needs."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import models; assert "
        "'load_model' in dir(models)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
