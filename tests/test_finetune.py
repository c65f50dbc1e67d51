"""--finetune: what is copied, what is initialised, what is refused."""

from __future__ import annotations

import argparse
import functools
import json
import sys

import pytest
import torch

from models import build_model
from models.heads import PRIOR_PROBABILITY
from models.weights.architecture import Purpose, adopt
from models.weights.finetune import FLAG, fine_tune, matching_rows
from models.weights.hugging_face import write_hugging_face
from models.weights.load import read_trained
from tests.golden import recipe
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, write_coco
from tests.processes import run_main_forked
from util.checkpoint import read_checkpoint, write_atomically
from util.class_map import COCO_CLASSES, Category, ClassMap
from util.config import parse_config, with_classes
from util.errors import UserError

sys.path.insert(0, str(ROOT / "tools"))

SMALL = (*SMALL_MODEL, "--num_classes", "auto")
REFINED, TWO_STAGE = ("--with_box_refine",), ("--with_box_refine", "--two_stage")
PETS = ClassMap(3, (Category(0, 3, "cat"), Category(1, 17, "dog"), Category(2, 1000, "hot dog")))
PRIOR = torch.tensor(PRIOR_PROBABILITY).logit()


def named(*names: str) -> ClassMap:
    return ClassMap(len(names), tuple(Category(label, label + 1, name) for label, name in enumerate(names)))


@functools.cache
def trained(*flags, classes: ClassMap = PETS):
    """A detector whose every weight is known by its name; not to be changed."""
    config = with_classes(parse_config([*SMALL, *flags]), classes)
    model = build_model(config)[0].eval()
    recipe.fill(model)
    return model, config


def entries(*flags, classes: ClassMap = PETS):
    """A checkpoint of ours."""
    model, config = trained(*flags, classes=classes)
    return {"model": model.state_dict(), "args": config.flags(), "classes": classes.to_plain()}


def fine_tuned(config, classes):
    """As main.py does it: the detector, and what was said."""
    source = config.run.finetune
    checkpoint = read_trained(source, FLAG)
    config = with_classes(
        adopt(config, checkpoint, source, FLAG, Purpose.FINE_TUNE, without_heads=True), classes
    )
    torch.manual_seed(1)
    model = build_model(config)[0]
    return model, str(fine_tune(model, config, classes, checkpoint, source))


@pytest.fixture
def tune(tmp_path):
    """Writes a checkpoint and fine-tunes a new detector from it: gives its weights, and what was
    said.
    """

    def run(checkpoint, classes, *flags):
        path = str(tmp_path / "a.pth")
        if checkpoint is not None:
            write_atomically(checkpoint, tmp_path / "a.pth")
        model, told = fine_tuned(parse_config([*SMALL, "--finetune", path, *flags]), classes)
        return model.state_dict(), told

    return run


def heads(state, layers=2):
    return [(state[f"class_embed.{i}.weight"], state[f"class_embed.{i}.bias"]) for i in range(layers)]


def rest(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("class_embed.")}


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# ---- class heads


@pytest.mark.parametrize("flags", [(), REFINED], ids=["one head", "a head a layer"])
def test_rows_go_where_their_names_are_now(tune, flags):
    new = named("Hot-Dog", "zebra", "CAT")
    state, told = tune(entries(*flags), new, *flags)
    before = trained(*flags)[0].state_dict()
    require_equal(rest(state), rest(before))
    for (weight, bias), (old_weight, old_bias) in zip(heads(state), heads(before), strict=True):
        assert torch.equal(weight[[0, 2]], old_weight[[2, 0]])
        assert torch.equal(bias[[0, 2]], old_bias[[2, 0]])
        assert bias[1] == pytest.approx(PRIOR.item())
        assert not (weight[1] == old_weight).all(-1).any()
    assert "2 of 3 classes copied by name: Hot-Dog, CAT" in told
    assert "initialised: zebra" in told
    assert "1 of the checkpoint skipped: dog" in told


def test_no_name_in_common_makes_all_rows_anew(tune):
    state, told = tune(entries(), named("ship", "plane"))
    require_equal(rest(state), rest(trained()[0].state_dict()))
    for weight, bias in heads(state):
        assert weight.shape == (2, 64)
        torch.testing.assert_close(bias, PRIOR.expand(2))
    assert "0 of 2 classes copied by name; initialised: ship, plane" in told


def test_the_same_classes_give_the_same_detector(tune):
    state, told = tune(entries(), PETS)
    require_equal(state, trained()[0].state_dict())
    assert "3 of 3 classes copied by name: cat, dog, hot dog" in told
    assert "initialised" not in told
    assert "skipped" not in told


def test_the_proposals_keep_their_row_of_objects(tune):
    """The encoder's head is trained on row 0 alone, whatever class has the label 0; all others are
    background.
    """
    state, _ = tune(entries(*TWO_STAGE), named("dog", "zebra", "ship", "cat"), *TWO_STAGE)
    before = trained(*TWO_STAGE)[0].state_dict()
    *_, (weight, bias) = heads(state, 3)
    *_, (old_weight, old_bias) = heads(before, 3)
    assert torch.equal(weight[:3], old_weight)
    assert torch.equal(bias[:3], old_bias)
    assert bias[3] == pytest.approx(PRIOR.item())
    for (weight, _), (old_weight, _) in zip(heads(state), heads(before), strict=True):
        assert torch.equal(weight[[0, 3]], old_weight[[1, 0]])


def test_coco_is_known_by_its_91_logits(tune):
    """As the published files are: no word about classes, a Namespace, names of
    DistributedDataParallel, aliases.
    """
    model, config = trained(*REFINED, classes=COCO_CLASSES)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {
        f"module.transformer.decoder.{n}": t
        for n, t in model.state_dict().items()
        if n.startswith("bbox_embed.")
    }
    args = argparse.Namespace(**{**config.flags(), "num_classes": None, "frozen_weights": None, "lr": 2e-4})
    new = named("person", "pottedplant", "aeroplane", "TV")
    found, told = tune({"model": state, "args": args, "epoch": 49}, new, *REFINED)
    assert torch.equal(
        found["class_embed.1.bias"][[0, 1, 3]], model.state_dict()["class_embed.1.bias"][[1, 64, 72]]
    )
    assert "3 of 4 classes copied by name: person, pottedplant, TV; initialised: aeroplane" in told
    assert "77 of the checkpoint skipped: bicycle, car" in told
    same, _ = tune(None, COCO_CLASSES, *REFINED)
    require_equal(same, model.state_dict())


def test_classes_without_names_are_taken_if_there_are_as_many(tune):
    unnamed = {"model": entries()["model"]}
    state, told = tune(unnamed, named("a", "b", "c"))
    require_equal(state, trained()[0].state_dict())
    assert "copied as they are; the checkpoint does not name its classes" in told
    state, told = tune(unnamed, named("a", "b"))
    torch.testing.assert_close(state["class_embed.0.bias"], PRIOR.expand(2))
    assert "initialised, for 2 classes; the checkpoint does not name its classes" in told


def test_rows_that_no_class_has_go_with_their_like():
    old, new = (
        ClassMap(4, (Category(1, 1, "a"), Category(3, 3, "b"))),
        ClassMap(5, (Category(1, 1, "b"), Category(2, 2, "c"))),
    )
    assert matching_rows(old, 4, new) == {1: 3, 0: 0}
    assert matching_rows(old, 4, old) == {0: 0, 1: 1, 2: 2, 3: 3}


# ---- other origins


def test_averaged_weights_are_preferred_and_said(tune):
    averaged = {name: tensor + 1 for name, tensor in trained()[0].state_dict().items()}
    state, told = tune({**entries(), "ema": {"model": averaged, "updates": 3}}, PETS)
    require_equal(state, averaged)
    assert "averaged weights" in told


def test_a_hugging_face_folder_is_as_good(tune, tmp_path):
    flags = (*REFINED, "--backbone_norm", "frozen_bn")
    model, config = trained(*flags)
    write_hugging_face(model.state_dict(), config, PETS, tmp_path / "folder")
    for source in (tmp_path / "folder", tmp_path / "folder" / "model.safetensors"):
        state, told = tune(None, named("dog", "zebra"), *flags, "--finetune", str(source))
        require_equal(rest(state), rest(model.state_dict()))
        assert torch.equal(state["class_embed.1.weight"][0], model.state_dict()["class_embed.1.weight"][1])
        assert "1 of 2 classes copied by name: dog; initialised: zebra" in told


def test_batchformer_is_added_to_a_plain_detector_and_left_away_from_another(tune):
    state, told = tune(entries(), PETS, *BATCHFORMER)
    plain = {name: tensor for name, tensor in state.items() if not name.startswith("transformer.bf.")}
    require_equal(plain, trained()[0].state_dict())
    assert f"BatchFormerV2: {len(state) - len(plain)} tensors initialised" in told
    state, told = tune(entries(*BATCHFORMER), PETS)
    require_equal(state, {n: t for n, t in trained(*BATCHFORMER)[0].state_dict().items() if n in state})
    assert "tensors skipped, which this run does not use" in told
    state, told = tune(entries(*BATCHFORMER), PETS, *BATCHFORMER)
    require_equal(state, trained(*BATCHFORMER)[0].state_dict())
    assert "BatchFormerV2" not in told


# ---- what is refused


@pytest.mark.parametrize(
    ("checkpoint", "run", "told"),
    [
        ((), REFINED, "leave out --with_box_refine"),
        (("--num_feature_levels", "3"), TWO_STAGE, "leave out --with_box_refine --two_stage"),
        (REFINED, ("--two_stage",), "leave out --two_stage"),
        (("--num_queries", "9"), (), "give --num_queries 9"),
        (
            ("--nheads", "8", "--enc_n_points", "2", "--dec_n_points", "2"),
            (),
            "--nheads 8",
        ),  # of the same shapes
        (
            ("--position_embedding_scale", "3"),
            ("--position_embedding_scale", "4"),
            "give --position_embedding_scale 3",
        ),
        (
            ("--num_feature_levels", "3", "--enc_layers", "1"),
            ("--num_feature_levels", "1"),
            "give --num_feature_levels 3 --enc_layers 1",
        ),
        (
            ("--dec_n_points", "2", "--dim_feedforward", "96"),
            ("--dec_n_points", "1"),
            "give --dim_feedforward 96 --dec_n_points 2",
        ),
        ((), ("--backbone_norm", "bn", "--backbone_weights", "imagenet"), "give --backbone_norm gn"),
        ((), (*REFINED, "--dec_layers", "3"), "give --dec_layers 2 and leave out --with_box_refine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_another_architecture_is_told_with_the_flags_to_give(tmp_path, checkpoint, run, told):
    told_by_weights = not any(
        flag in checkpoint for flag in ("--nheads", "--dilation", "--position_embedding_scale")
    )
    content = entries(*checkpoint)
    config = parse_config([*SMALL, "--finetune", str(tmp_path / "a.pth"), *run])
    for entry in (content, *([{"model": content["model"]}] if told_by_weights else [])):
        write_atomically(entry, tmp_path / "a.pth")
        with pytest.raises(UserError) as error:
            fine_tuned(config, PETS)
        assert told in str(error.value)
        assert str(error.value).startswith(f"--finetune {tmp_path / 'a.pth'} is of another detector: ")
        assert "\n" not in str(error.value)


def test_what_makes_no_difference_may_differ(tune):
    tune(entries(*TWO_STAGE), PETS, *TWO_STAGE, "--num_queries", "7")
    frozen = ("--backbone_norm", "frozen_bn")
    state, _ = tune(entries("--backbone_norm", "bn"), PETS, *frozen)
    require_equal(
        state, {n: t for n, t in trained("--backbone_norm", "bn")[0].state_dict().items() if n in state}
    )


def test_files_that_are_no_detector(tune, tmp_path):
    with pytest.raises(UserError, match="--finetune.*no Deformable DETR"):
        tune({"model": {"a": torch.zeros(1)}}, PETS)
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"--finetune.*a\.pth"):
        tune(None, PETS)
    with pytest.raises(UserError, match=r"--finetune.*missing\.pth does not exist"):
        tune(None, PETS, "--finetune", "missing.pth")
    with pytest.raises(UserError, match=r"--finetune.*is a folder; name a checkpoint in it$"):
        tune(None, PETS, "--finetune", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--finetune.*model\.safetensors"):
        tune(None, PETS, "--finetune", str(tmp_path / "empty"))


def test_a_run_is_not_started_in_the_folder_that_it_starts_from():
    with pytest.raises(UserError, match="another --output_dir"):
        parse_config(["--finetune", "exps/a/checkpoint.pth", "--output_dir", "./exps/a/"])


# ---- the program


def test_a_run_starts_with_the_weights_and_goes_on_after_the_same_command(tmp_path):
    """Two more classes than the checkpoint knows, and BatchFormerV2; no ImageNet weights are asked
    for.
    """
    write_coco(tmp_path / "data", num_train=4, num_val=2)
    frozen = ("--backbone_norm", "frozen_bn")
    classes = named("three", "other")
    write_atomically(entries(*frozen, classes=classes), tmp_path / "a.pth")
    out = tmp_path / "out"
    flags = (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL,
        *frozen,
        "--backbone_weights",
        "imagenet",
        *BATCHFORMER,
        "--lr",
        "0",
        "--lr_backbone",
        "0",
        "--finetune",
        str(tmp_path / "a.pth"),
        "--output_dir",
        str(out),
        "--resume",
        "auto",
    )
    first = run_main_forked(*flags, "--epochs", "1")
    assert first.returncode == 0, first.stderr
    assert f"fine-tuning from {tmp_path / 'a.pth'}" in first.stdout
    assert (
        "1 of 3 classes copied by name: three; initialised: one, two; 1 of the checkpoint skipped: "
        "other" in first.stdout
    )
    assert "BatchFormerV2: 12 tensors initialised" in first.stdout
    saved, before = read_checkpoint(out / "checkpoint.pth"), trained(*frozen, classes=classes)[0].state_dict()
    assert saved["args"]["finetune"] == str(tmp_path / "a.pth")
    for name, tensor in rest(before).items():  # with rates of 0 all is as it was
        assert torch.equal(saved["model"][name], tensor), name
    assert torch.equal(saved["model"]["class_embed.0.bias"][2], before["class_embed.0.bias"][0])
    (tmp_path / "a.pth").unlink()  # not needed any more
    second = run_main_forked(*flags, "--epochs", "2")
    assert second.returncode == 0, second.stderr
    assert "resuming from" in second.stdout
    assert "fine-tuning" not in second.stdout
    assert [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()] == [0, 1]


def test_mistakes_end_the_program_in_one_line(tmp_path):
    write_coco(tmp_path / "data", num_train=2)
    write_atomically(entries(*REFINED), tmp_path / "a.pth")
    result = run_main_forked(
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL,
        "--finetune",
        str(tmp_path / "a.pth"),
        "--two_stage",
    )
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: --finetune {tmp_path / 'a.pth'} is of another detector: leave out --two_stage\n"
    )
