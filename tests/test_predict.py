"""tools/predict.py: pictures, folders and videos in; annotated copies and COCO results out."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from datasets.file_index import BARE, END, SPELLING
from models import build_model, load_detector
from tests.helpers import ROOT, SMALL_IMAGES, SMALL_MODEL, environment
from tests.processes import run_main_forked
from tools import predict
from util.class_map import Category, ClassMap
from util.config import parse_config
from util.errors import UserError

av = pytest.importorskip("av", reason="videos need PyAV")

NAMES = {3: "person", 17: "Straßenbahn", 1000: "dog", 1001: "owl"}
CLASSES = ClassMap(4, tuple(Category(label, *entry) for label, entry in enumerate(NAMES.items())))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights; scores lie around 0.01, and differ."""
    config = parse_config([*SMALL_MODEL, *SMALL_IMAGES])
    torch.manual_seed(0)
    model = build_model(config)[0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "args": config.flags(), "classes": CLASSES.to_plain()}, path)
    return path


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """The command in this process, in the folder tmp_path; gives the detections and the entries of
    images.json.
    """
    monkeypatch.chdir(tmp_path)

    def command(*flags: object) -> tuple[list[dict], list[dict]]:
        predict.main(
            ["--resume", str(checkpoint), "--output_dir", "out", "--device", "cpu", *map(str, flags)]
        )
        images = json.loads(Path("out/images.json").read_text())
        assert images["categories"] == [{"id": c.id, "name": c.name} for c in CLASSES.categories]
        return json.loads(Path("out/predictions.json").read_text()), images["images"]

    return command


def results_of(found, image_id: int) -> list[dict]:
    return [
        {
            "image_id": image_id,
            "category_id": d.category_id,
            "bbox": pytest.approx([d.box[0], d.box[1], d.box[2] - d.box[0], d.box[3] - d.box[1]], abs=1e-4),
            "score": d.score,
        }
        for d in found
    ]


def files_in(folder: str | Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def refusal(run, *flags: object) -> str:
    with pytest.raises(UserError) as error:
        run(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- pictures


def test_the_detections_are_those_of_the_detector(run, checkpoint, tmp_path):
    picture((80, 60)).save("a.png")
    picture((40, 60), 1).save("b.jpg")
    results, images = run("a.png", "b.jpg", "--score_threshold", "0.02")
    assert images == [
        {"id": 1, "file_name": "a.png", "width": 80, "height": 60},
        {"id": 2, "file_name": "b.jpg", "width": 40, "height": 60},
    ]
    detector = load_detector(checkpoint, device="cpu")
    found = [detector(name).above(0.02) for name in ("a.png", "b.jpg")]
    assert all(0 < len(one) < 48 for one in found)
    assert results == [*results_of(found[0], 1), *results_of(found[1], 2)]


def test_pictures_are_drawn_under_their_names(run):
    Path("in/deep/er").mkdir(parents=True)
    picture((80, 60)).save("in/10.png")
    picture((80, 60)).save("in/2.jpg")
    picture((80, 60)).save("in/deep/2.jpg")
    picture((700, 500)).save("in/deep/er/x.GIF")
    Path("in/.hidden").mkdir()
    picture((80, 60)).save("in/.hidden/1.png")
    picture((80, 60)).save("in/.1.png")
    Path("in/notes.txt").write_text("no picture")
    _, images = run("in", "--score_threshold", "0.02")
    assert [entry["file_name"] for entry in images] == ["2.jpg", "10.png", "deep/2.jpg", "deep/er/x.GIF"], (
        "natural order"
    )
    written = {"2.jpg", "10.png", "deep/2.jpg", "deep/er/x.GIF.png"}
    assert files_in("out") == written | {"predictions.json", "images.json"}
    drawn = Image.open("out/10.png")
    assert drawn.size == (480, 360), "enlarged"
    assert Image.open("out/deep/er/x.GIF.png").size == (700, 500)
    original = np.asarray(picture((80, 60)).resize(drawn.size, Image.Resampling.LANCZOS))
    changed = (np.asarray(drawn) != original).any(axis=2).mean()
    assert 0.02 < changed < 0.9, "boxes and tags are on it, and the picture is still to be seen"


def test_without_detections_the_picture_is_as_it_was(run):
    picture((640, 480)).save("a.png")
    results, _ = run("a.png", "--score_threshold", "0.9")
    assert results == []
    assert Image.open("out/a.png").tobytes() == picture((640, 480)).tobytes()


def test_the_files_can_be_had_without_pictures(run):
    picture((80, 60)).save("a.png")
    run("a.png", "--no_pictures")
    assert files_in("out") == {"predictions.json", "images.json"}


def test_same_names_in_different_folders_stay_apart_and_files_given_twice_are_one(run):
    for folder in ("left", "right/deep"):
        Path(folder).mkdir(parents=True)
        picture((80, 60)).save(f"{folder}/a.png")
    _, images = run("left", "right/deep/a.png", "left/a.png", "./left/../left/a.png")
    assert [entry["file_name"] for entry in images] == ["left/a.png", "right/deep/a.png"]
    assert {"left/a.png", "right/deep/a.png"} < files_in("out")


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_give_every_picture_once(run, checkpoint, batch_size):
    for i in range(5):
        picture((80, 60 + i), i).save(f"{i}.png")
    names = [f"{i}.png" for i in range(5)]
    results, images = run(*names, "--batch_size", batch_size, "--score_threshold", "0")
    assert [entry["id"] for entry in images] == [1, 2, 3, 4, 5]
    wanted = load_detector(checkpoint, device="cpu", batch_size=batch_size)(names)
    assert results == [row for i, found in enumerate(wanted, 1) for row in results_of(found, i)]


def test_a_picture_of_a_telephone_is_upright(run):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((640, 480)).transpose(Image.Transpose.ROTATE_90).save("a.png", exif=exif)
    _, images = run("a.png", "--score_threshold", "0.9")
    assert (images[0]["width"], images[0]["height"]) == (640, 480)
    assert Image.open("out/a.png").tobytes() == picture((640, 480)).tobytes()


def test_images_json_serves_other_programs(run, tmp_path):
    """pycocotools, and tools/draw_detections.py."""
    from tools import draw_detections

    Path("in").mkdir()
    picture((80, 60)).save("in/a.png")
    results, _ = run("in", "--score_threshold", "0.02")
    assert len(COCO("out/images.json").loadRes("out/predictions.json").anns) == len(results) > 0
    draw_detections.main(
        [
            "--annotations",
            "out/images.json",
            "--images",
            "in",
            "--predictions",
            "out/predictions.json",
            "--output_dir",
            "drawn",
        ]
    )
    assert "a.png" in files_in("drawn")


# ---- COCO's ids


def write_annotations(path: Path, names: dict[int, str], categories: dict[int, str]) -> None:
    content = {
        "images": [
            {"id": number, "file_name": name, "width": 80, "height": 60} for number, name in names.items()
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": min(names),
                "category_id": 17,
                "bbox": [1, 2, 30, 40],
                "area": 1200,
                "iscrowd": 0,
            }
        ],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    path.write_text(json.dumps(content))


def test_annotations_give_the_ids_and_the_figures_are_those_of_evaluation(run, checkpoint, tmp_path):
    """Sparse ids of images and categories; main.py --eval on the same data, batch 1."""
    images = tmp_path / "data/val2017"
    (images / "sub").mkdir(parents=True)
    (tmp_path / "data/annotations").mkdir()
    names = {1000: "sub/a.png", 3: "a.png", 0: "b.png"}
    exif = Image.Exif()
    exif[0x0112] = 6  # training and evaluation take pixels as they are stored
    for number, name in names.items():
        picture((80, 60), number).save(images / name, exif=exif)
    annotations = tmp_path / "data/annotations/instances_val2017.json"
    write_annotations(annotations, names, NAMES)
    results, entries = run(
        "data/val2017", "--annotations", annotations, "--score_threshold", "0", "--no_pictures"
    )
    assert {entry["id"]: entry["file_name"] for entry in entries} == names
    assert {entry["width"] for entry in entries} == {80}
    assert {row["category_id"] for row in results} == {3, 17, 1000, 1001}
    evaluated = run_main_forked(
        *SMALL_MODEL[:-2],
        *SMALL_IMAGES,
        "--eval",
        "--resume",
        str(checkpoint),
        "--batch_size",
        "1",
        "--output_dir",
        str(tmp_path / "eval"),
        "--save_predictions",
        "--device",
        "cpu",
        "--val_images",
        str(images),
        "--val_annotations",
        str(annotations),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    wanted = json.loads((tmp_path / "eval/predictions.json").read_text())
    assert len(wanted) == len(results) == 3 * 48
    for row, other in zip(sorted(results, key=lambda row: row["image_id"]), wanted, strict=True):
        assert (row["image_id"], row["category_id"]) == (other["image_id"], other["category_id"])
        assert row["score"] == pytest.approx(other["score"], abs=1e-6)
        assert row["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def test_images_and_categories_are_enough_to_give_ids(run, capsys):
    """As COCO's image_info_test-dev2017.json, even without sizes: no annotations, and a part only
    of the images in test2017.
    """
    Path("test2017").mkdir()
    for name in ("a", "b", "c", "d"):
        picture((80, 60)).save(f"test2017/{name}.png")
    write_annotations(Path("info.json"), {1000: "b.png", 3: "d.png", 5: "lost.png"}, NAMES)
    content = json.loads(Path("info.json").read_text())
    del content["annotations"], content["images"][0]["width"], content["images"][0]["height"]
    Path("info.json").write_text(json.dumps(content))
    results, entries = run(
        "test2017", "--annotations", "info.json", "--score_threshold", "0", "--no_pictures"
    )
    assert {entry["id"]: entry["file_name"] for entry in entries} == {1000: "b.png", 3: "d.png"}
    assert {row["image_id"] for row in results} == {1000, 3}
    told = capsys.readouterr().out
    assert "pictures that --annotations info.json does not list, left out: 2\n" in told
    assert "images of --annotations info.json without a picture here: 1\n" in told
    del content["categories"]
    Path("info.json").write_text(json.dumps(content))
    assert "no list 'categories'" in refusal(run, "test2017", "--annotations", "info.json")


def test_no_detection_is_told_with_the_best_score(run, checkpoint, capsys):
    picture((80, 60)).save("a.png")
    best = load_detector(checkpoint, device="cpu")("a.png").scores[0].item()
    run("a.png")
    assert 0 < best < 0.3
    line = (
        f"detections that score 0.3 and more: 0 (the best scores {best:.2g}; lower "
        "--score_threshold to see it)"
    )
    assert line in capsys.readouterr().out
    run("a.png", "--score_threshold", best / 2)
    assert "the best scores" not in capsys.readouterr().out


def test_annotated_names_may_be_those_of_another_system(run, capsys):
    Path("photos/Über").mkdir(parents=True)
    for name in ("Über/a 1.jpg", "b.JPG", "c.jpg", "e.jpg"):
        picture((80, 60)).save(f"photos/{name}")
    written = {7: "U\u0308ber\\a%201.jpg", 3: "b.jpg", 5: "c.jpg", 9: "d.jpg", 11: "other/e.jpg"}
    write_annotations(Path("names.json"), written, NAMES)
    _, images = run("photos", "--annotations", "names.json", "--no_pictures")
    assert {entry["id"]: entry["file_name"] for entry in images} == {
        number: written[number] for number in (7, 3, 5)
    }
    assert f"{SPELLING}: 2" in capsys.readouterr().out


def test_annotated_names_may_be_paths_on_another_machine(run, capsys):
    """The end counts, where it is of one picture only and the size is the annotated one."""
    for name, size in {
        "a.png": (80, 60),
        "b.png": (80, 60),
        "c.png": (60, 60),
        "d/e.png": (80, 60),
        "f/e.png": (80, 60),
    }.items():
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        picture(size).save(f"photos/{name}")
    written = {
        7: "C:\\pics\\a.png",
        3: "/home/me/pics/b.png",
        5: "../pics/c.png",
        9: "/home/me/e.png",
        11: "/home/d/e.png",
    }
    write_annotations(Path("names.json"), written, NAMES)
    _, images = run("photos", "--annotations", "names.json", "--no_pictures")
    assert {entry["id"]: entry["file_name"] for entry in images} == {
        7: "pics/a.png",
        3: "home/me/pics/b.png",
        11: "home/d/e.png",
    }
    told = capsys.readouterr().out
    assert f"{BARE}: 2" in told and f"{END}: 1" in told


def test_annotations_that_do_not_fit_are_told(run, tmp_path):
    for folder in ("l", "r"):
        Path(folder).mkdir()
        picture((80, 60)).save(f"{folder}/a.png")
    write_annotations(Path("one.json"), {7: "a.png"}, NAMES)
    message = refusal(run, "l", "r", "--annotations", "one.json")
    assert "l/a.png" in message
    assert "r/a.png" in message
    write_annotations(Path("none.json"), {7: "b.png"}, NAMES)
    assert "none.json lists none of the pictures" in refusal(run, "l", "--annotations", "none.json")
    write_annotations(Path("other.json"), {7: "a.png"}, {17: "dog"})
    assert "17" in refusal(run, "l", "--annotations", "other.json")
    assert "nowhere.json" in refusal(run, "l", "--annotations", "nowhere.json")
    Path("clip.mp4").touch()
    assert "clip.mp4 is a video" in refusal(run, "clip.mp4", "--annotations", "one.json")


# ---- files that can't be used


def test_bad_files_stop_the_command_or_are_left_out(run, capsys):
    Path("in").mkdir()
    for i in range(5):
        picture((80, 60), i).save(f"in/{i}.png")
    Path("in/1.png").write_bytes(b"no picture")
    Path("in/3.png").write_bytes(Path("in/3.png").read_bytes()[:200])
    message = refusal(run, "in")
    assert "in/1.png" in message
    assert "--on_bad_image skip" in message
    json.loads(Path("out/predictions.json").read_text())  # whole, with what there was before
    _, images = run("in", "--on_bad_image", "skip", "--batch_size", "2")
    assert [(entry["id"], entry["file_name"]) for entry in images] == [
        (1, "0.png"),
        (3, "2.png"),
        (5, "4.png"),
    ]
    told = capsys.readouterr()
    assert [line.split()[:2] for line in told.err.splitlines() if "left out:" in line] == [
        ["left", "out:"]
    ] * 2
    assert "pictures: 3;" in told.out
    assert "; files left out: 2" in told.out
    assert "none of the 2 files" in refusal(run, "in/1.png", "in/3.png", "--on_bad_image", "skip")
    assert "--max_image_megapixels" in refusal(run, "in/0.png", "--max_image_megapixels", "0.001")


def test_inputs_that_can_not_be_are_told_before_anything_is_loaded(run, tmp_path):
    Path("in/empty").mkdir(parents=True)
    picture((80, 60)).save("in/a.png")
    assert "in/empty holds no pictures" in refusal(run, "in/empty", "--resume", "none.pth")
    assert "gone.jpg does not exist" in refusal(run, "in", "gone.jpg", "--resume", "none.pth")
    for folder in ("in", "in/out", "in/../in/out"):
        assert "lies in the input folder" in refusal(
            run, "in", "--output_dir", folder, "--resume", "none.pth"
        )
    assert "would replace the input" in refusal(run, "in/a.png", "--output_dir", "in", "--resume", "none.pth")
    assert "is a file" in refusal(run, "in", "--output_dir", "in/a.png", "--resume", "none.pth")
    picture((80, 60)).save("in/a.bmp")
    picture((80, 60)).save("in/a.bmp.png")
    assert "one copy" in refusal(run, "in", "--resume", "none.pth")
    assert "none.pth" in refusal(run, "in/a.png", "--resume", "none.pth")
    assert "--batch_size 0" in refusal(run, "in/a.png", "--batch_size", "0")
    assert not Path("out").exists()


def test_a_folder_that_can_not_be_searched_is_told(run, monkeypatch):
    """Root may read all folders, so the refusal is the file system's by proxy."""
    Path("in/secret").mkdir(parents=True)
    picture((80, 60)).save("in/a.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "in/secret can't be searched (Permission denied)" in refusal(run, "in")


def test_what_can_not_be_written_is_told_in_a_line(run, monkeypatch):
    picture((80, 60)).save("a.png")

    def full(self, path, **options):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert refusal(run, "a.png") == "out/a.png can't be written (No space left on device)"
    json.loads(Path("out/predictions.json").read_text())
    Path("out").rename("moved")
    Path("folder").write_text("")
    assert "folder" in refusal(run, "a.png", "--output_dir", "folder/out")


def test_what_is_made_ahead_comes_in_order_with_its_errors():
    made, closed = [], []

    def items():
        try:
            for i in range(9):
                made.append(i)
                if i == 7:
                    raise ValueError("the eighth")
                yield i
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(ValueError, match="the eighth"):
        for item in predict.ahead(items(), 3):
            taken.append(item)
            assert len(made) <= len(taken) + 3
    assert taken == list(range(7))
    stopped = predict.ahead(items(), 3)
    assert next(stopped) == 0
    stopped.close()
    assert closed == [True, True], "the generator is closed when nobody wants more"


# ---- videos


def write_video(
    path: str, size: tuple[int, int], times: list[Fraction], *, codec: str = "libx264", turn: int = 0
) -> None:
    """Frames of one colour each, 10 brighter from frame to frame, with the upper tenth white."""
    with av.open(path, "w") as container:
        stream = container.add_stream(
            codec, rate=Fraction(30000, 1001), options={"crf": "10"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30000)
        if turn:
            stream.set_display_rotation(turn)
        for i, seconds in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 60 + 10 * (i % 12), np.uint8)
            pixels[: size[1] // 10] = 255
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = round(seconds * 30000), Fraction(1, 30000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def read_video(path: str) -> tuple[list[np.ndarray], list[float], Fraction]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return (
            [frame.to_ndarray(format="rgb24") for frame in frames],
            [frame.time for frame in frames],
            stream.average_rate,
        )


RATE = Fraction(30000, 1001)
EVEN = [i / RATE for i in range(12)]
UNEVEN = [Fraction(t, 30) for t in (0, 1, 2, 5, 6, 12, 13, 20, 21, 22, 30, 45)]


@pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("size", [(320, 240), (322, 180), (161, 91)], ids=str)
def test_a_video_keeps_its_frames_times_and_size(run, size, times):
    even = size[0] + size[0] % 2, size[1] + size[1] % 2
    write_video(
        "clip.mkv", even if size == even else size, times, codec="libx264" if size == even else "libvpx-vp9"
    )
    results, images = run("clip.mkv", "--score_threshold", "0.02", "--batch_size", "5")
    assert [entry["frame"] for entry in images] == list(range(12))
    assert [entry["id"] for entry in images] == list(range(1, 13))
    assert {entry["file_name"] for entry in images} == {"clip.mkv"}
    assert [entry["seconds"] for entry in images] == pytest.approx([float(t) for t in times], abs=2e-3)
    assert {row["image_id"] for row in results} == set(range(1, 13))
    original, _, rate = read_video("clip.mkv")
    frames, seconds, new_rate = read_video("out/clip.mkv.mp4")
    assert len(frames) == 12
    assert {frame.shape for frame in frames} == {(size[1], size[0], 3)}
    assert seconds == pytest.approx([float(t) for t in times], abs=2e-3)
    if times is EVEN:
        assert float(new_rate) == pytest.approx(float(rate), rel=1e-3)
    for before, after in zip(original, frames, strict=True):
        changed = (abs(before.astype(int) - after) > 40).any(axis=2).mean()
        assert 0.01 < changed < 0.95, "boxes are on it, and the picture is still to be seen"


def test_a_frame_without_detections_keeps_its_colours(run):
    write_video("clip.mp4", (320, 240), EVEN)
    run("clip.mp4", "--score_threshold", "0.9")
    for before, after in zip(read_video("clip.mp4")[0], read_video("out/clip.mp4")[0], strict=True):
        assert abs(before.astype(int) - after).mean() < 3


@pytest.mark.skipif(
    not hasattr(av.video.stream.VideoStream, "set_display_rotation"),
    reason="an older PyAV can't write rotation",
)
@pytest.mark.parametrize(("turn", "white"), [(-90, np.s_[:, -10:]), (90, np.s_[:, :10]), (180, np.s_[-10:])])
def test_a_video_of_a_telephone_is_upright(run, turn, white):
    write_video("clip.mp4", (320, 240), EVEN[:2], turn=turn)
    _, images = run("clip.mp4", "--score_threshold", "0.9")
    frames, _, _ = read_video("out/clip.mp4")
    assert frames[0].shape == ((240, 320, 3) if turn == 180 else (320, 240, 3))
    assert (images[0]["height"], images[0]["width"]) == frames[0].shape[:2]
    assert frames[0][white].mean() > 230
    assert frames[0].mean() < 120


def test_pictures_and_videos_are_numbered_on(run):
    write_video("clip.mp4", (320, 240), EVEN[:3])
    picture((80, 60)).save("a.png")
    picture((80, 60)).save("b.png")
    _, images = run("a.png", "clip.mp4", "b.png", "--no_pictures")
    assert [(entry["id"], entry["file_name"]) for entry in images] == [
        (1, "a.png"),
        (2, "clip.mp4"),
        (3, "clip.mp4"),
        (4, "clip.mp4"),
        (5, "b.png"),
    ]


def test_a_video_that_can_not_be_read(run, capsys):
    Path("a.mp4").write_bytes(b"no video")
    picture((80, 60)).save("b.png")
    message = refusal(run, "a.mp4")
    assert "a.mp4 can't be opened" in message
    assert "--on_bad_image skip" in message
    _, images = run("a.mp4", "b.png", "--on_bad_image", "skip")
    assert [entry["file_name"] for entry in images] == ["b.png"]
    assert "left out: " in capsys.readouterr().err


def test_a_video_cut_short_is_predicted_as_far_as_it_goes(run):
    write_video("clip.mkv", (320, 240), [i / RATE for i in range(90)])
    whole = Path("clip.mkv").read_bytes()
    Path("clip.mkv").write_bytes(whole[: len(whole) // 2])
    _, images = run("clip.mkv", "--on_bad_image", "skip")
    assert 5 < len(images) < 90
    assert len(read_video("out/clip.mkv.mp4")[0]) == len(images)


@pytest.mark.parametrize("batch_size", ["1", "2", "4"])
def test_the_frames_before_a_broken_one_are_predicted_in_any_batch(run, monkeypatch, capsys, batch_size):
    from util.images.video import VideoReader

    frames = VideoReader.__iter__

    def breaking(self):
        yield from itertools.islice(frames(self), 5)
        raise self._bad("can't be decoded after 5 frames")

    monkeypatch.setattr(VideoReader, "__iter__", breaking)
    write_video("clip.mp4", (96, 64), [i / RATE for i in range(8)])
    _, images = run("clip.mp4", "--batch_size", batch_size, "--on_bad_image", "skip")
    assert len(images) == len(read_video("out/clip.mp4")[0]) == 5
    assert "after 5 frames" in capsys.readouterr().err


def test_without_pyav_a_video_is_refused_and_pictures_are_not(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    picture((80, 60)).save("b.png")
    Path("a.mp4").write_bytes(b"")
    assert "pip install av" in refusal(run, "a.mp4")
    run("b.png")


def test_a_long_video_is_never_all_in_memory(run, monkeypatch):
    """No more frames are read than a few before the last that was written."""
    from util.images.video import VideoReader, VideoWriter

    read, written, farthest = 0, 0, 0
    frames, add = VideoReader.__iter__, VideoWriter.add

    def counted(self):
        nonlocal read
        for frame in frames(self):
            read += 1
            yield frame

    def counting(self, *arguments):
        nonlocal written, farthest
        add(self, *arguments)
        written += 1
        farthest = max(farthest, read - written)

    monkeypatch.setattr(VideoReader, "__iter__", counted)
    monkeypatch.setattr(VideoWriter, "add", counting)
    write_video("clip.mp4", (96, 64), [i / RATE for i in range(60)])
    run("clip.mp4", "--batch_size", "2")
    assert read == written == 60
    assert farthest <= 12


# ---- the command


def test_the_commands_and_lines_of_the_documentation_run(run, checkpoint, tmp_path, capsys):
    """Word for word, on small data under the names that docs/prediction.md uses."""
    for folder in ("photos", "exps/synthetic", "data/synthetic/val2017", "data/synthetic/annotations"):
        Path(folder).mkdir(parents=True)
    Path("exps/synthetic/checkpoint.pth").symlink_to(checkpoint)
    for name in ("photos/a.jpg", "street.jpg", "data/synthetic/val2017/a.png"):
        picture((80, 60)).save(name)
    write_video("drive.mp4", (320, 240), EVEN[:2])
    write_annotations(Path("data/synthetic/annotations/instances_val2017.json"), {7: "a.png"}, NAMES)
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs/prediction.md").read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks].count("bash") == 2
    namespace: dict = {}
    for kind, text in blocks:
        if kind == "python":
            exec(text, namespace)
            continue
        python, tool, *flags = shlex.split(text)
        assert (python, tool) == ("python", "tools/predict.py")
        predict.main(flags)
    assert {"photos/a.jpg", "street.jpg", "drive.mp4"} < files_in("predictions")
    assert "a.png" not in files_in("predictions"), "the second command writes no pictures"
    assert {row["image_id"] for row in json.loads(Path("predictions/predictions.json").read_text())} == {7}
    assert "detections on 80 x 60 pixels" in capsys.readouterr().out
    assert Image.open("drawn.png").width == 480


def test_help_is_complete_and_needs_no_torch():
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['predict.py', '--help']; "
    code += "runpy.run_path('tools/predict.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "example:\n  python tools/predict.py --resume" in result.stdout
    assert "(default: 0.3)" in result.stdout
    assert "SUPPRESS" not in result.stdout
    for flag in (
        "--annotations",
        "--amp",
        "--weights",
        "--on_bad_image",
        "--eval_size",
        "--dilation",
        "--device",
    ):
        assert flag in result.stdout


def test_a_mistake_ends_the_command_with_one_line(checkpoint, tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/predict.py",
            "--resume",
            checkpoint,
            "gone.jpg",
            "--output_dir",
            "out",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment(PYTHONPATH=""),
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: gone.jpg does not exist; give pictures, videos, or folders of pictures"
    ]
