"""The synthetic data set: the same for the same seed, true to its pictures, and valid COCO."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from datasets.synthetic import paint, scene, write
from datasets.synthetic.__main__ import main
from datasets.synthetic.write import generate
from tests.helpers import run
from util.errors import run_as_command

SMALL = {"train_images": 12, "val_images": 4, "image_size": 48, "num_classes": 3, "max_objects": 2, "seed": 0}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return np.count_nonzero(first & second) / np.count_nonzero(first | second)


def tight_corners(mask: np.ndarray) -> list[int]:
    """Left, top, right, bottom."""
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "set"
    assert generate(folder, workers=1, **SMALL)
    return folder


@pytest.fixture(scope="module")
def big_set(tmp_path_factory):
    """Big enough for every rare thing to occur."""
    folder = tmp_path_factory.mktemp("big") / "set"
    generate(folder, workers=2, train_images=150, val_images=5, image_size=96, num_classes=8, max_objects=4)
    return folder


@pytest.fixture(scope="module")
def big_coco(big_set):
    return COCO(str(big_set / "annotations" / "instances_train2017.json"))


# --- determinism ---


def test_the_files_do_not_depend_on_the_number_of_workers(small_set, tmp_path):
    generate(tmp_path / "set", workers=2, **SMALL)
    assert files_of(tmp_path / "set") == files_of(small_set)


def test_the_first_images_do_not_depend_on_how_many_follow(small_set, tmp_path):
    generate(tmp_path / "set", **{**SMALL, "train_images": 5})
    images = files_of(tmp_path / "set" / "train2017")
    assert len(images) == 5
    assert images.items() <= files_of(small_set / "train2017").items()


def test_another_seed_gives_other_images(small_set, tmp_path):
    generate(tmp_path / "set", **{**SMALL, "seed": 1})
    ours, theirs = (set(files_of(folder / "train2017").values()) for folder in (small_set, tmp_path / "set"))
    assert len(ours) == len(theirs) == SMALL["train_images"]
    assert not ours & theirs


def test_train_and_val_share_neither_images_nor_ids(big_set, big_coco):
    val = COCO(str(big_set / "annotations" / "instances_val2017.json"))
    assert len(val.imgs) == 5
    assert not set(val.imgs) & set(big_coco.imgs)
    train_images, val_images = (set(files_of(big_set / split).values()) for split in write.SPLITS)
    assert not train_images & val_images


# --- content ---


def test_every_image_is_there_in_the_size_that_the_annotations_say(big_set, big_coco):
    assert len(big_coco.imgs) == len(list((big_set / "train2017").iterdir())) == 150
    for entry in big_coco.imgs.values():
        with Image.open(big_set / "train2017" / entry["file_name"]) as image:
            assert image.mode == "RGB"
            assert image.size == (entry["width"], entry["height"])
        assert max(image.size) == 96
        assert min(image.size) >= 72
    assert len({(entry["width"], entry["height"]) for entry in big_coco.imgs.values()}) > 10


def test_categories_are_complete_and_all_occur(big_coco):
    names = {category["id"]: category["name"] for category in big_coco.cats.values()}
    assert names == dict(enumerate(paint.CLASS_NAMES, start=1))
    assert {annotation["category_id"] for annotation in big_coco.anns.values()} == set(names)


def test_only_the_asked_classes_and_number_of_objects_occur(small_set):
    coco = COCO(str(small_set / "annotations" / "instances_train2017.json"))
    assert [category["name"] for category in coco.cats.values()] == list(paint.CLASS_NAMES[:3])
    assert {annotation["category_id"] for annotation in coco.anns.values()} == {1, 2, 3}
    assert {len(coco.getAnnIds(image_id, iscrowd=False)) for image_id in coco.imgs} <= {0, 1, 2}


def test_boxes_lie_in_the_image_and_are_tight_around_the_segmentation(big_coco):
    for annotation in big_coco.anns.values():
        entry = big_coco.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= entry["width"]
        assert 0 <= y < y + height <= entry["height"]
        assert tight_corners(big_coco.annToMask(annotation)) == [x, y, x + width, y + height]


def test_area_is_that_of_the_segmentation(big_coco):
    for annotation in big_coco.anns.values():
        assert annotation["area"] == big_coco.annToMask(annotation).sum()


def test_annotations_describe_visible_parts_so_they_do_not_overlap(big_coco):
    occluded = 0
    for image_id in big_coco.imgs:
        annotations = big_coco.loadAnns(big_coco.getAnnIds(image_id))
        if len(annotations) < 2:
            continue
        depth = sum(big_coco.annToMask(annotation).astype(int) for annotation in annotations)
        assert depth.max() == 1
        boxes = np.array([annotation["bbox"] for annotation in annotations])
        overlap = mask_utils.iou(boxes, boxes, [0] * len(boxes))
        occluded += np.count_nonzero(np.triu(overlap, 1) > 0.1)
    assert occluded > 20, "objects must hide parts of others somewhere, or this test sees nothing"


def test_crowds_are_rare_and_there(big_coco):
    kinds = [annotation["iscrowd"] for annotation in big_coco.anns.values()]
    assert kinds.count(0) > 200
    assert 1 <= kinds.count(1) <= 15


def test_a_few_images_are_empty(big_coco):
    empty = [image_id for image_id in big_coco.imgs if not big_coco.getAnnIds(image_id)]
    assert 1 <= len(empty) <= 15


def test_annotations_match_what_is_drawn(monkeypatch):
    """On black ground and in white paint, the bright pixels of a picture are those of its
    annotations.
    """

    def white(rng, ground, is_plain):
        return paint.Paint("solid", np.full((2, 3), 255.0), angle=0.0, period=1.0, shading=0.0)

    monkeypatch.setattr(scene, "random_paint", white)
    monkeypatch.setattr(scene, "_background", lambda rng, height, width: np.zeros((height, width, 3)))
    ious = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        image, objects, _ = scene.render_scene(rng, image_size=96, num_classes=8, max_objects=4)
        annotations = [write.annotation_of(item) for item in objects]
        drawn = image[..., 0] >= 128
        if not annotations or any(annotation["iscrowd"] for annotation in annotations):
            continue
        described = np.zeros_like(drawn)
        for annotation in annotations:
            described |= mask_utils.decode(annotation["segmentation"]).astype(bool)
        ious.append(iou(drawn, described))
    assert len(ious) >= 20
    assert min(ious) >= 0.95
    assert np.mean(ious) >= 0.98, "a shift by one pixel costs more"


@pytest.mark.parametrize("name", paint.CLASS_NAMES)
def test_a_shape_fills_its_box_to_a_share_of_its_own(name):
    """Areas by geometry, of shapes that do not lie on their side."""
    pose = paint.Pose(x=100.0, y=100.0, radius=90.0, angle=0.0, stretch=1.0)
    patch = paint.sample_shape(name, pose, margin=0)
    mask = patch.coverage >= 0.5
    left, top, right, bottom = tight_corners(mask)
    star = 5 * 0.45 * np.sin(np.pi / 5) / ((1 + np.cos(np.pi / 5)) * 2 * np.sin(2 * np.pi / 5))
    share = {
        "circle": np.pi / 4,
        "square": 1.0,
        "triangle": 0.5,
        "star": star,
        "cross": (2 * 1.9 * 0.6 - 0.6**2) / 1.9**2,
        "ring": np.pi / 4 * (1 - (0.5 / 0.95) ** 2),
    }
    measured = np.count_nonzero(mask) / ((right - left) * (bottom - top))
    if name in share:
        assert measured == pytest.approx(share[name], rel=0.03)
    else:
        assert 0.25 < measured < 0.8
    assert 0.85 < np.hypot(patch.u, patch.v)[patch.inside].max() <= 1, (
        "shapes fill the unit disc and lie in it"
    )


@pytest.mark.parametrize(("x", "y"), [(0.3, 20.0), (39.2, 20.0), (20.0, 0.3), (20.0, 39.2), (1.0, 38.0)])
def test_the_frame_cuts_a_shape_and_does_not_move_it(x, y):
    def object_at(shift, side):
        pose = paint.Pose(x + shift, y + shift, radius=12.0, angle=0.4, stretch=0.9)
        canvas = scene.Scene(np.zeros((side + 40, side + 40, 3)), 20, [])
        return canvas.make_object(1 + paint.CLASS_NAMES.index("heart"), [pose], is_crowd=False)

    cut, whole = object_at(0, 40), object_at(20, 80)
    np.testing.assert_array_equal(cut.mask, whole.mask[20:60, 20:60])
    assert cut.area == whole.area == np.count_nonzero(whole.mask) > np.count_nonzero(cut.mask) > 0


def test_specks_that_others_cut_off_are_not_annotated():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:10, 2:10] = mask[15, 15] = True
    annotation = write.annotation_of(scene.SceneObject(1, [], mask, area=100))
    assert annotation["bbox"] == [2.0, 2.0, 8.0, 8.0]
    assert annotation["area"] == 64.0


def test_a_placement_that_hides_an_object_is_refused():
    mask = np.zeros((20, 20), dtype=bool)
    mask[5:15, 5:15] = True
    earlier = scene.SceneObject(1, [], mask, area=100)

    def candidate(rows_hidden):
        hiding = np.zeros_like(mask)
        hiding[5 : 5 + rows_hidden, 5:15] = True
        return scene.SceneObject(1, [], hiding, area=10 * rows_hidden)

    most = int(10 * (1 - scene.MIN_VISIBLE))
    drawn = scene.Scene(np.zeros((60, 60, 3)), 20, [earlier])
    assert drawn.has_room_for(candidate(most))
    assert not drawn.has_room_for(candidate(most + 1))


# --- folders ---


def run_main(folder: Path, *extra: str) -> None:
    main(["--output_dir", str(folder), *(f"--{name}={value}" for name, value in SMALL.items()), *extra])


def error_of(capsys, folder: Path, *extra: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_as_command(lambda: run_main(folder, *extra))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_same_settings_again_do_nothing(small_set, capsys):
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    run_main(small_set)
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob("*")} == before


def test_other_settings_need_force(tmp_path, capsys):
    run_main(tmp_path / "set")
    before = files_of(tmp_path / "set")
    assert "--force" in error_of(capsys, tmp_path / "set", "--seed=1")
    assert files_of(tmp_path / "set") == before
    run_main(tmp_path / "set", "--seed=1", "--force")
    assert files_of(tmp_path / "set") != before
    assert json.loads((tmp_path / "set" / "synthetic.json").read_text())["seed"] == 1
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("add_settings", [False, True])
def test_foreign_files_are_never_replaced(tmp_path, capsys, add_settings):
    (tmp_path / "thesis.tex").write_text("years of work")
    if add_settings:
        (tmp_path / "synthetic.json").write_text("{}")
    assert str(tmp_path) in error_of(capsys, tmp_path, "--force")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("stage", ["_write_split", "_replace"])
def test_an_interrupted_run_changes_nothing(tmp_path, monkeypatch, stage):
    run_main(tmp_path / "set")
    before = files_of(tmp_path)

    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, stage, interrupt)
    for folder in (tmp_path / "set", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            generate(folder, force=True, **SMALL)
    assert files_of(tmp_path) == before
    assert os.listdir(tmp_path) == ["set"]


def test_a_failed_exchange_puts_the_old_set_back(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(FileNotFoundError):
        write._replace(folder, tmp_path / "missing", aside=tmp_path / "aside")
    assert files_of(tmp_path) == {"set/old": b"old"}


# --- command line ---


@pytest.mark.parametrize(
    "argument",
    [
        "--train_images=-1",
        "--val_images=-1",
        "--image_size=31",
        "--num_classes=0",
        f"--num_classes={len(paint.CLASS_NAMES) + 1}",
        "--max_objects=0",
        "--seed=-1",
        "--workers=0",
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_it(tmp_path, capsys, argument):
    name, value = re.fullmatch(r"--(\w+)=(.*)", argument).groups()
    assert f"error: {name} {value} must be from" in error_of(capsys, tmp_path / "set", argument)
    assert not (tmp_path / "set").exists()


def test_errors_of_the_command_have_no_traceback(tmp_path):
    """A folder below a file cannot be made, whoever runs the test."""
    (tmp_path / "file").touch()
    done = run(sys.executable, "-m", "datasets.synthetic", "--output_dir", str(tmp_path / "file" / "set"))
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr)
