"""Image files that can't be used: named, skipped and counted; what is never opened, decoded or
executed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset
from datasets.bad_images import BadImages
from datasets.coco import CocoDetection
from datasets.coco_eval import evaluate_results
from datasets.loader import build_loader
from datasets.samplers import EvalBatches, TrainBatches
from engine import evaluate
from models import build_model
from tests.golden import recipe
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, run, write_coco
from util.config import parse_config
from util.errors import UserError
from util.images.files import FORMATS, BadImageError, decode

CPU = torch.device("cpu")
WORKERS = pytest.mark.parametrize("workers", [0, 2])


def config_for(folder, *flags):
    return parse_config(["--coco_path", str(folder), *SMALL_IMAGES, *SMALL_MODEL, *flags])


@pytest.fixture
def data(tmp_path):
    write_coco(tmp_path, num_train=8, num_val=5)
    return tmp_path


def spoil(folder: Path, split: str, *indices: int) -> list[str]:
    """Make images undecodable, every second one missing; gives their paths."""
    paths = [folder / f"{split}2017" / f"{index:06}.png" for index in indices]
    for i, path in enumerate(paths):
        path.unlink() if i % 2 else path.write_bytes(path.read_bytes()[:60])
    return [str(path) for path in paths]


def in_order(dataset, batch_size: int) -> list[list[int]]:
    return [list(range(i, i + batch_size)) for i in range(0, len(dataset), batch_size)]


# ---- training: the next usable one takes the place


@WORKERS
def test_in_training_the_next_usable_image_takes_the_place(data, caplog, workers):
    good = build_dataset("train", config_for(data))
    wanted = [good[i] for i in (0, 3, 3, 3, 4, 5, 6, 0)]
    bad = spoil(data, "train", 1, 2, 7)
    dataset = build_dataset("train", config_for(data))
    record = BadImages("skip", 3)
    loader = build_loader(dataset, in_order(dataset, 2), workers, CPU, record)
    for _ in range(2):
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [2, 2, 2, 2]
        items = [(images.tensors[k], targets[k]) for images, targets in batches for k in range(2)]
        for (image, target), (pixels, expected) in zip(items, wanted, strict=True):
            assert torch.equal(image[:, : pixels.shape[1], : pixels.shape[2]], pixels)
            assert target["image_id"] == expected["image_id"]
            assert torch.equal(target["boxes"], expected["boxes"])
    lines = [line.getMessage() for line in caplog.records]
    assert len(lines) == record.count == 3, "each file is said once, however often it is met"
    for path in bad:
        assert any(path in line and "replaced" in line for line in lines)
    assert sum("No such file" in line for line in lines) == 1


def test_what_takes_the_place_depends_on_seed_epoch_and_index_alone(data):
    spoil(data, "train", 2, 3)
    seen = []
    for workers in (0, 2):
        dataset = build_dataset("train", config_for(data))
        order = TrainBatches(8, 2, 0, 1, seed=3)
        order.epoch = dataset.epoch = 4
        seen.append(list(build_loader(dataset, order, workers, CPU, BadImages("skip", 9))))
    for (a, _), (b, _) in zip(*seen, strict=True):
        assert torch.equal(a.tensors, b.tensors)


@WORKERS
def test_more_bad_images_than_allowed_end_the_run(data, workers):
    last = spoil(data, "train", 1, 4, 6)[-1]
    dataset = build_dataset("train", config_for(data))
    with pytest.raises(UserError) as error:
        list(build_loader(dataset, in_order(dataset, 1), workers, CPU, BadImages("skip", 2)))
    assert "3 image files" in str(error.value)
    assert "--max_bad_images 2" in str(error.value)
    assert last in str(error.value)


@pytest.mark.parametrize("limit", [0, 3, 100])
def test_a_folder_of_bad_images_ends_the_run_at_once(data, limit):
    spoil(data, "train", *range(8))
    dataset = build_dataset("train", config_for(data))
    with pytest.raises(UserError, match="--max_bad_images") as error:
        next(iter(build_loader(dataset, in_order(dataset, 2), 0, CPU, BadImages("skip", limit))))
    assert str(min(limit + 1, 8)) in str(error.value)


@WORKERS
def test_by_default_the_first_bad_image_ends_the_run(data, workers):
    (path,) = spoil(data, "train", 5)
    dataset = build_dataset("train", config_for(data))
    with pytest.raises(UserError) as error:
        list(build_loader(dataset, in_order(dataset, 2), workers, CPU))
    assert path in str(error.value)
    assert "--on_bad_image skip" in str(error.value)


def test_the_record_goes_on_after_a_resume(data, caplog):
    spoil(data, "train", 1, 4)
    dataset = build_dataset("train", config_for(data))
    before = BadImages("skip", 2)
    list(build_loader(dataset, [[1], [4]], 0, CPU, before))
    state = json.loads(json.dumps(before.state_dict()))
    caplog.clear()
    after = BadImages("skip", 2)
    after.load_state_dict(state)
    assert after.count == 2
    assert after.state_dict() == before.state_dict()
    list(build_loader(dataset, [[1], [4]], 0, CPU, after))
    assert not caplog.records, "known files are not said again"
    spoil(data, "train", 6)
    with pytest.raises(UserError, match="3 image files"):
        list(build_loader(dataset, [[6]], 0, CPU, after))
    for damaged in (None, {}, {"paths": 3}, {"paths": [1]}):
        with pytest.raises(UserError, match="damaged"):
            BadImages("skip", 2).load_state_dict(damaged)


def test_the_cache_leaves_out_what_cannot_be_read(data):
    spoil(data, "train", 0, 1)
    with pytest.raises(BadImageError, match="000001"):
        build_dataset("train", config_for(data, "--cache_mode"))
    dataset = build_dataset("train", config_for(data, "--cache_mode", "--on_bad_image", "skip"))
    for path in (data / "train2017").iterdir():
        path.unlink()
    assert torch.equal(dataset[2][0], dataset[2][0])
    with pytest.raises(BadImageError, match="000001"):
        dataset[1]


# ---- evaluation: an image without detections


@WORKERS
def test_in_evaluation_it_counts_as_an_image_without_detections(data, caplog, workers):
    spoil(data, "val", 0, 1, 2)
    config = config_for(data)
    dataset = build_dataset("val", config)
    model, criterion, postprocessors = build_model(config)
    recipe.fill(model)
    record = BadImages("skip", 100)
    loader = build_loader(dataset, EvalBatches(5, 2, 0, 1), workers, CPU, record, replace=False)
    assert [[t["image_id"].item() for t in targets] for _, targets in loader] == [[13], [14]], (
        "an empty batch is passed over"
    )
    caplog.clear()
    result = evaluate(model, criterion, postprocessors, loader, dataset, config.run)
    assert {r["image_id"] for r in result.results} == {13, 14}
    assert record.count == 3
    assert "3 images of this pass were left out" in caplog.text
    truth = [a for a in dataset.coco.anns.values() if a["image_id"] in (13, 14)]
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth
    ]
    found = evaluate_results(dataset.coco, perfect).eval["recall"][0, :, 0, 2]
    objects = [sum(a["category_id"] == c for a in dataset.coco.anns.values()) for c in (1, 2, 3)]
    seen = [sum(a["category_id"] == c for a in truth) for c in (1, 2, 3)]
    assert found == pytest.approx([s / n for s, n in zip(seen, objects, strict=True)]), (
        "its objects count as missed"
    )


# ---- files that are not opened, images that are not decoded


def reference(name: str, path: Path) -> BadImageError | None:
    """What reading the file gives: an error, or nothing."""
    folder = path.parent.parent
    content = {
        "images": [{"id": 1, "file_name": name, "width": 4, "height": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": "one"}],
    }
    (folder / "one.json").write_text(json.dumps(content))
    try:
        CocoDetection(
            path.parent,
            folder / "one.json",
            lambda image, target: (torch.zeros(3, 4, 4), target),
            num_classes=4,
            seed=0,
        )[0]
    except BadImageError as error:
        return error
    return None


def test_only_regular_files_are_opened_and_links_may_lead_to_them(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert reference("link.png", folder / "link.png") is None
    os.mkfifo(folder / "pipe.png")  # nobody writes: opening it would wait forever
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    for name in ("pipe.png", "zero.png", "folder.png"):
        assert "not a regular file" in str(reference(name, folder / name))
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="not a regular file"):
        CocoDetection(folder, tmp_path / "pipe.json", None, num_classes=4, seed=0)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def webp_claiming(width: int, height: int) -> bytes:
    canvas = (
        b"VP8X"
        + struct.pack("<II", 10, 0)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas


def gif_claiming(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame


@pytest.mark.parametrize(
    ("content", "megapixels"),
    [
        (png_claiming(60000, 60000), "3600"),
        (png_claiming(1500, 1000), "1.5"),
        (gif_claiming(65535, 65535), "4295"),
        (webp_claiming(60000, 60000), "3600"),
        (b"P6 50000 50000 255\n", "2500"),
    ],
)
def test_absurd_sizes_are_refused_by_the_header(tmp_path, content, megapixels):
    with pytest.raises(BadImageError) as error:
        decode(content, tmp_path / "large.png", 0.7, "or else")
    for part in ("large.png", f"{megapixels} megapixels", "--max_image_megapixels 0.7", "or else"):
        assert part in str(error.value)


PILLOWS_LIMIT = """
import sys
import warnings
from pathlib import Path
from PIL import Image

warnings.simplefilter("error", Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = 5000  # it warns above this, and refuses above twice this

from util.images.files import decode
from util.errors import run_as_command

path = Path(sys.argv[1])
image = decode(path.read_bytes(), path, 0.02, "or else")
image.crop((0, 0, 190, 95))
print(image.size, flush=True)
run_as_command(lambda: decode(path.read_bytes(), path, 0.015, "or else"))
"""


def test_the_flag_alone_decides_what_is_too_large(tmp_path):
    """Neither Pillow's error nor its warning comes before, for the image or for a crop of it."""
    Image.new("RGB", (200, 100)).save(tmp_path / "image.png")
    result = run(sys.executable, "-c", PILLOWS_LIMIT, str(tmp_path / "image.png"))
    assert result.stdout == "(200, 100)\n"
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "has 0.02 megapixels, more than --max_image_megapixels 0.015 allows" in line


def test_a_file_longer_than_any_image_of_that_size_is_not_read(data):
    path = data / "val2017/000000.png"
    with open(path, "ab") as file:
        file.truncate(2**36)  # 64 GiB of nothing, which takes no room on the disk
    with pytest.raises(BadImageError, match="--max_image_megapixels"):
        build_dataset("val", config_for(data))[0]


def test_no_format_that_runs_a_program_is_opened(tmp_path, monkeypatch):
    """Pillow hands Encapsulated PostScript to Ghostscript."""
    marker = tmp_path / "executed"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (8, 8)).save(tmp_path / "drawing.eps")
    with pytest.raises(BadImageError, match="no JPEG, PNG"):
        decode((tmp_path / "drawing.eps").read_bytes(), tmp_path / "drawing.eps", 100, "")
    with pytest.raises(Exception):  # noqa: B017 - whatever Pillow makes of our Ghostscript
        Image.open(tmp_path / "drawing.eps").load()
    if not marker.exists():
        pytest.skip("this Pillow runs no program either")


@pytest.mark.parametrize("name", [*FORMATS, "MPO"])
def test_every_format_is_read(tmp_path, name):
    image = Image.new("RGB", (20, 10), (200, 100, 50))
    image.save(
        tmp_path / "image", name, **({"save_all": True, "append_images": [image]} if name == "MPO" else {})
    )
    decoded = decode((tmp_path / "image").read_bytes(), tmp_path / "image", 1, "")
    assert decoded.size == (20, 10)
    assert np.abs(np.asarray(decoded).astype(int).mean((0, 1)) - (200, 100, 50)).max() < 8


def test_a_strip_of_a_single_column_stays_small(tmp_path):
    """Brought to a shorter side of 600, it would have gigabytes."""
    write_coco(tmp_path, num_train=1, size=(1, 60000))
    dataset = build_dataset("train", parse_config(["--coco_path", str(tmp_path)]))
    for dataset.epoch in range(4):  # the crop is drawn in half of them
        assert dataset[0][0].numel() < 3 * 1400 * 1400


# ---- random choices


class Choices:
    """A transform that draws from all three generators."""

    def __call__(self, image, target):
        drawn = [torch.rand(()).item(), random.random(), np.random.random()]  # noqa: NPY002
        return torch.tensor(drawn).reshape(3, 1, 1), target


def test_items_are_the_same_whatever_generator_a_transform_draws_from(data):
    def dataset():
        return CocoDetection(
            data / "train2017",
            data / "annotations/instances_train2017.json",
            Choices(),
            num_classes=4,
            seed=1,
        )

    alone = dataset()
    wanted = [alone[i][0].flatten() for i in range(8)]
    assert len({value.item() for item in wanted for value in item}) == 24
    for workers in (0, 2):
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        batches = list(build_loader(dataset(), [[7, 6], [5], [0, 1, 2], [3, 4]], workers, CPU))
        items = [row.flatten() for images, _ in batches for row in images.tensors]
        for index, item in zip((7, 6, 5, 0, 1, 2, 3, 4), items, strict=True):
            assert torch.equal(item, wanted[index])
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    alone.epoch = 1
    assert not torch.equal(alone[0][0].flatten(), wanted[0])


def test_the_generators_go_on_after_an_item_that_failed(data):
    def fails(image, target):
        random.random()
        raise RuntimeError

    dataset = CocoDetection(
        data / "train2017", data / "annotations/instances_train2017.json", fails, num_classes=4, seed=1
    )
    state = random.getstate()
    with pytest.raises(RuntimeError):
        dataset[0]
    assert random.getstate() == state


@pytest.fixture(autouse=True)
def _warnings_are_captured(caplog):
    caplog.set_level(logging.INFO)
