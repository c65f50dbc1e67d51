"""What people get wrong: one line that names the culprit and the remedy, a non-zero exit, and
nothing lost.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from datasets import build_dataset
from main import main
from models import build_model
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, run_main, write_coco
from tests.processes import run_main_forked
from util.config import check_trainable, parse_config
from util.errors import UserError, run_as_command

CHECKPOINT = "checkpoint.pth"


class Scene:
    """A data set, and an output folder with a checkpoint of an earlier run in it."""

    def __init__(self, folder: Path) -> None:
        self.data, self.out = folder / "data", folder / "out"
        write_coco(self.data, num_train=4, num_val=2)
        self.out.mkdir()
        self.checkpoint = self.out / CHECKPOINT
        torch.save({"model": {"precious": torch.ones(3)}}, self.checkpoint)

    def annotations(self, split: str) -> Path:
        return self.data / "annotations" / f"instances_{split}2017.json"

    def edit(self, split: str, change) -> None:
        content = json.loads(self.annotations(split).read_text())
        change(content)
        self.annotations(split).write_text(json.dumps(content))

    def image(self, split: str, index: int = 0) -> Path:
        return sorted((self.data / f"{split}2017").iterdir())[index]

    def weights(self, name: str, *flags: str) -> Path:
        path = self.out.parent / name
        torch.save({"model": build_model(parse_config([*SMALL_MODEL, *flags]))[0].state_dict()}, path)
        return path


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def malicious(path: Path, marker: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    path.write_bytes(pickle.dumps({"model": {}, "args": Evil()}))


def no_data_folder(s):
    return ["--coco_path", str(s.data / "nowhere")], ["nowhere", "--coco_path"]


def no_image_folder(s):
    (s.data / "val2017").rename(s.data / "elsewhere")
    return [], ["val2017", "--coco_path"]


def no_annotation_file(s):
    s.annotations("train").unlink()
    return [], ["instances_train2017.json", "--coco_path"]


def annotations_not_json(s):
    truncate(s.annotations("val"))
    return [], ["instances_val2017.json", "not JSON"]


def annotations_not_coco(s):
    s.edit("train", lambda c: c.pop("categories"))
    return [], ["instances_train2017.json", "categories"]


def annotation_without_box(s):
    s.edit("train", lambda c: c["annotations"][1].pop("bbox"))
    return [], ["instances_train2017.json", "annotations[1]", "bbox"]


def box_of_text(s):
    s.edit("train", lambda c: c["annotations"][1].update(bbox=["a", 1, 2, 3]))
    return [], ["instances_train2017.json", "annotation 2", "bbox"]


def image_missing(s):
    s.image("train", 1).unlink()
    return [], ["000001.png", "instances_train2017.json"]


def image_truncated(s):
    truncate(s.image("train", 2))
    return [], ["000002.png", "replace the file"]


def image_of_nothing(s):
    s.image("val").write_bytes(b"")
    return [], ["000000.png", "replace the file"]


def label_outside(s):
    def change(content):
        for entry in [content["categories"][0], *content["annotations"]]:
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = 17 if entry[key] == 1 else entry[key]

    s.edit("train", change)
    return [], ["17", "--num_classes 18", "--num_classes auto"]


def object_without_category(s):
    s.edit("train", lambda c: c["annotations"][0].update(category_id=17))
    return ["--num_classes", "auto"], ["17", "instances_train2017.json", "category"]


def no_categories(s):
    s.edit("train", lambda c: c.update(categories=[]))
    return [], ["instances_train2017.json", "no categories"]


def validation_of_other_categories(s):
    s.edit("val", lambda c: c["categories"][1].update(name="zwei"))
    return [], ["instances_val2017.json", "'zwei'", "'two'"]


def empty_validation_set(s):
    s.edit("val", lambda c: c.update(images=[], annotations=[]))
    return [], ["instances_val2017.json", "no images"]


def too_few_images(s):
    return ["--batch_size", "9"], ["4 training images", "--batch_size"]


def checkpoint_missing(s):
    return ["--resume", str(s.out / "none.pth")], ["none.pth", "--resume"]


def checkpoint_is_the_folder_of_a_run(s):
    return ["--resume", str(s.out)], ["--resume", "is a folder", str(s.checkpoint)]


def checkpoint_truncated(s):
    path = s.weights("t.pth")
    truncate(path)
    return ["--resume", str(path)], ["t.pth", "truncated"]


def checkpoint_malicious(s):
    path = s.out.parent / "m.pth"
    malicious(path, s.out.parent / "executed")
    return ["--resume", str(path)], ["m.pth"]


def checkpoint_of_other_classes(s):
    return ["--resume", str(s.weights("c.pth", "--num_classes", "9"))], [
        "c.pth",
        "class_embed",
        "--num_classes",
    ]


def checkpoint_two_stage(s):
    path = s.weights("two.pth", "--with_box_refine", "--two_stage")
    return ["--resume", str(path), "--num_queries", "13", "--dec_layers", "3"], [
        "two.pth",
        "give --dec_layers 2",
    ]


def checkpoint_of_other_norm(s):
    return ["--resume", str(s.weights("bn.pth", "--backbone_norm", "bn"))], ["bn.pth", "--backbone_norm"]


def checkpoint_is_no_detector(s):
    return ["--resume", str(s.checkpoint)], [CHECKPOINT, "holds no Deformable DETR"]


def backbone_file_missing(s):
    return ["--backbone_weights", str(s.data / "none.pth")], ["none.pth", "--backbone_weights"]


def device_missing(s):
    return ["--device", "cuda:99"], ["--device" if not torch.cuda.is_available() else "GPU"]


def device_nonsense(s):
    return ["--device", "abacus"], ["--device", "abacus"]


def output_is_a_file(s):
    return ["--output_dir", str(s.checkpoint)], [CHECKPOINT, "--output_dir"]


def random_behind_frozen(s):
    return ["--backbone_norm", "frozen_bn"], ["--backbone_norm gn"]


def call_main(*flags: str) -> int:
    """The program as its command line runs it, in this process, which has torch imported; gives the
    exit code.
    """
    with pytest.raises(SystemExit) as end:
        run_as_command(lambda: main(parse_config(flags)))
    return end.value.code


SCENES = [
    value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__code__", None) and value.__code__.co_varnames[:1] == ("s",)
]


@pytest.mark.parametrize("mistake", SCENES, ids=lambda f: f.__name__)
def test_mistakes_get_one_line_and_lose_nothing(scene, mistake, capsys):
    flags, named = mistake(scene)
    before = scene.checkpoint.read_bytes()
    code = call_main(
        "--coco_path",
        str(scene.data),
        "--output_dir",
        str(scene.out),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--epochs",
        "1",
        "--num_workers",
        "0",
        *flags,
    )
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    for part in named:
        assert part in line
    kept = [path for path in scene.out.rglob(CHECKPOINT) if path.read_bytes() == before]
    assert kept, "the earlier checkpoint is still there"
    assert not (scene.out.parent / "executed").exists()


def test_a_loader_process_reports_the_same_way(scene):
    """The image that can't be read is met in another process."""
    flags, named = image_truncated(scene)
    result = run_main_forked(
        "--coco_path",
        str(scene.data),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--epochs",
        "1",
        "--num_workers",
        "2",
        *flags,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in named)


def test_evaluation_reports_the_same_way(scene):
    path = scene.weights("w.pth")
    truncate(scene.image("val", 1))
    result = run_main_forked(
        "--coco_path",
        str(scene.data),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--num_workers",
        "0",
        "--eval",
        "--resume",
        str(path),
    )
    assert result.returncode == 2
    assert "000001.png" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


COMBINATIONS = [
    (["--bf", "1"], "--insert_idx"),
    (["--bf", "7"], "--insert_idx"),
    (["--bf", "2", "--insert_idx", "0"], "--bf"),
    (["--bf", "1", "--insert_idx", "6"], "--enc_layers 6"),
    (["--bf", "1", "--insert_idx", "-1"], "--insert_idx -1"),
    (["--bf", "1", "--insert_idx", "0", "--insert_idx", "0"], "twice"),
    (["--bf", "1", "--insert_idx"], "insert_idx"),
    (["--bf", "1", "--insert_idx", "0", "--share_bf", "2"], "share_bf"),
    (["--bf", "1", "--insert_idx", "0", "--bt_num_layers", "0"], "--bt_num_layers"),
    (["--insert_idx", "0"], "--bf 1"),
    (["--share_bf", "0"], "--bf 1"),
    (["--bt_num_layers", "2"], "--bf 1"),
    (["--eval_bf"], "--bf 1"),
    (["--two_stage"], "--with_box_refine"),
    (["--eval"], "--resume"),
    (["--save_predictions"], "--output_dir"),
    (["--frozen_weights", "x.pth"], "--masks"),
    (["--masks", "--frozen_weights", "x.pth", "--finetune", "y.pth"], "--finetune"),
    (["--masks", "--frozen_weights", "x.pth", "--bf", "1", "--insert_idx", "0"], "--bf"),
    (["--mask_loss_coef", "2"], "--masks"),
    (["--dice_loss_coef", "2"], "--masks"),
    (["--panoptic_score", "0.5"], "--masks"),
    (["--masks", "--panoptic_overlap", "1.5"], "--panoptic_overlap"),
    (["--coco_panoptic_path", "x"], "--dataset_file coco_panoptic"),
    (["--remove_difficult"], "--remove_difficult"),
    (["--dilation", "--backbone", "resnet18"], "resnet50"),
    (["--backbone", "vgg16"], "backbone"),
    (["--backbone_norm", "gn"], "--backbone_weights none"),
    (["--backbone_weights", ""], "--backbone_weights"),
    (["--num_feature_levels", "2"], "--num_feature_levels"),
    (["--num_feature_levels", "0"], "--num_feature_levels"),
    (["--hidden_dim", "100"], "--hidden_dim"),
    (["--hidden_dim", "32"], "--hidden_dim"),
    (["--hidden_dim", "96", "--nheads", "5"], "--nheads"),
    (["--batch_size", "0"], "--batch_size"),
    (["--accumulate_steps", "0"], "--accumulate_steps"),
    (["--epochs", "0"], "--epochs"),
    (["--start_epoch", "50"], "--epochs 50"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--lr_drop", "0"], "--lr_drop"),
    (["--lr_drop_epochs", "30", "20"], "--lr_drop_epochs"),
    (["--dropout", "1"], "--dropout"),
    (["--drop_path", "-0.1"], "--drop_path"),
    (["--set_cost_class", "0", "--set_cost_bbox", "0", "--set_cost_giou", "0"], "--set_cost_class"),
    (["--train_sizes"], "--train_sizes"),
    (["--train_sizes", "2000"], "--max_size"),
    (["--eval_size", "1400"], "--max_size"),
    (["--crop_sizes", "600", "384"], "--crop_sizes"),
    (["--crop_sizes", "600"], "--crop_sizes"),
    (["--crop_resize_sizes", "0"], "--crop_resize_sizes"),
    (["--num_classes", "0"], "--num_classes"),
    (["--num_classes", "all"], "--num_classes"),
    (["--train_images", "x"], "--train_annotations"),
    (["--val_annotations", "x.json"], "--val_images"),
    (["--finetune", "a.pth", "--resume", "b.pth"], "--finetune"),
    (["--finetune", "a.pth", "--resume", "auto", "--eval", "--output_dir", "x"], "--finetune"),
    (["--tensorboard"], "--output_dir"),
    (["--num_workers", "-1"], "--num_workers"),
    (["--log_every", "0"], "--log_every"),
    (["--batch_sise", "2"], "--batch_sise"),
    (["--batch", "2"], "--batch"),
    (["--epochs", "many"], "many"),
]


@pytest.mark.parametrize(
    ("flags", "named"), COMBINATIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_flags_that_cannot_work_are_refused(flags, named):
    with pytest.raises(UserError) as error:
        parse_config(flags)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--backbone_weights", "none"], "--backbone_norm gn"),
        (["--position_embedding", "learned"], "--max_size"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        check_trainable(parse_config(flags))


def test_the_program_refuses_flags_in_one_line():
    result = run_main("--bf", "1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --bf 1 needs --insert_idx")
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_kind_of_data_set():
    config = parse_config(["--dataset_file", "voc"])
    with pytest.raises(UserError, match="--dataset_file 'voc' is unknown; use coco or coco_panoptic"):
        build_dataset("train", config)
