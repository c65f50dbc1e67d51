"""Reading COCO-format data, and its transforms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from datasets import build_dataset
from datasets.loader import build_loader, collate
from datasets.samplers import EvalBatches, TrainBatches
from datasets.transforms import Area, RandomCrop, RandomShorterSide
from models import build_model
from models.deformable_detr import MEAN, STD
from tests.golden_cases import FOLDER
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, write_coco
from util.class_map import COCO_CLASSES
from util.config import parse_config
from util.images.prepare import resized
from util.nested_tensor import NestedTensor


def config_for(folder, *flags):
    return parse_config(["--coco_path", str(folder), *flags])


def normalized(image):
    """Bytes as the published transforms normalise them."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), MEAN, STD)


def test_the_detector_normalises_bytes_to_the_bits_of_the_transforms():
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 40, 64), (3, 48, 32))
    images = [torch.randint(256, size, generator=generator, dtype=torch.uint8) for size in sizes]
    model, *_ = build_model(parse_config([*SMALL_MODEL]), COCO_CLASSES)
    found = model._normalized(NestedTensor.from_images(images))
    wanted = NestedTensor.from_images([normalized(image) for image in images])
    assert torch.equal(found.tensors, wanted.tensors)
    assert torch.equal(found.mask, wanted.mask)
    with pytest.raises(ValueError, match="2 dtypes"):
        model([images[0], normalized(images[1])])


def test_eval_transform_gives_the_published_numbers(tiny_coco):
    facts = json.loads((FOLDER / "tiny_coco_eval_transform.json").read_text())
    config = config_for(tiny_coco)
    dataset = build_dataset("val", config)
    assert len(dataset) == facts["length_val"]
    assert len(build_dataset("train", config)) == facts["length_train"]
    for fact in facts["val"]:
        image, target = dataset[fact["index"]]
        assert list(image.shape) == fact["shape"]
        image = normalized(image)
        assert image.mean().item() == pytest.approx(fact["mean"], abs=1e-5)
        assert image.std().item() == pytest.approx(fact["std"], abs=1e-5)
        for channel, y, x, value in fact["pixels"]:
            assert image[channel, y, x].item() == pytest.approx(value, abs=1e-5)
        assert target["image_id"].item() == fact["image_id"]
        assert target["labels"].tolist() == fact["labels"]
        np.testing.assert_allclose(target["boxes"], np.reshape(fact["boxes"], (-1, 4)), atol=1e-6)
        np.testing.assert_allclose(target["area"], fact["area"], rtol=1e-5)
        assert target["orig_size"].tolist() == fact["orig_size"]
        assert target["size"].tolist() == fact["size"]


def test_resize_gives_the_published_sizes():
    facts = json.loads((FOLDER / "resize_sizes.json").read_text())
    for width, height, *wanted in facts["rows"]:
        for setting, size in zip(facts["settings"], wanted, strict=True):
            assert resized(height, width, setting["size"], setting["max_size"]) == tuple(size), (
                width,
                height,
                setting,
            )


def test_training_items_stay_true_to_their_images(tiny_coco):
    """However an image is flipped, scaled and cropped, its boxes lie inside and its sizes are among
    the allowed ones.
    """
    dataset = build_dataset("train", config_for(tiny_coco))
    flips = set()
    for index in range(12):
        image, target = dataset[index]
        height, width = image.shape[1:]
        assert min(height, width) in range(480, 801, 32) or max(height, width) in range(1331, 1336)
        corners = box_convert(target["boxes"], "cxcywh", "xyxy")
        assert corners.min() > -1e-6
        assert corners.max() < 1 + 1e-6
        assert (target["boxes"][:, 2:] > 0).all()
        assert len(target["labels"]) == len(target["boxes"]) == len(target["area"]) == len(target["iscrowd"])
        assert not target["iscrowd"].any()
        assert target["labels"].dtype == torch.int64
        flips.add(height / width)
    assert len(flips) > 6


def test_crop_moves_boxes_with_the_pixels():
    """A white square on black is found by its box after any crop and resize."""
    for seed in range(20):
        torch.manual_seed(seed)
        pixels = np.zeros((300, 400, 3), np.uint8)
        pixels[100:180, 150:260] = 255
        boxes = BoundingBoxes(
            torch.tensor([[150.0, 100, 260, 180]]), format=BoundingBoxFormat.XYXY, canvas_size=(300, 400)
        )
        image, out = RandomCrop(120, 250)(
            Image.fromarray(pixels), {"boxes": boxes, "area": Area(torch.tensor([8800.0]))}
        )
        image, out = RandomShorterSide([200], None)(image, out)
        white = np.asarray(image)[..., 0] > 127
        x0, y0, x1, y1 = out["boxes"][0].tolist()
        if not white.any():
            assert x0 == x1 or y0 == y1
            continue
        rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        np.testing.assert_allclose(
            [x0, y0, x1, y1], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.5
        )


def test_area_follows_the_scale():
    image = Image.new("RGB", (100, 50))
    _, out = RandomShorterSide([100], None)(image, {"area": Area(torch.tensor([30.0]))})
    assert out["area"].item() == pytest.approx(120)


def test_items_depend_on_seed_epoch_and_index_alone(tmp_path):
    write_coco(tmp_path, num_train=6)
    config = config_for(tmp_path, *SMALL_IMAGES)
    first, second = build_dataset("train", config), build_dataset("train", config)
    torch.manual_seed(1)
    a = first[3][0]
    torch.manual_seed(2)
    assert len(second[1]) == len(second[5]) == 2, "other items, drawn before"
    assert torch.equal(a, second[3][0])
    second.epoch = 1
    assert any(
        first[i][0].shape != second[i][0].shape or not torch.equal(first[i][0], second[i][0])
        for i in range(6)
    )
    state = torch.get_rng_state()
    first[0]
    assert torch.equal(state, torch.get_rng_state()), (
        "an item must not disturb the generator that dropout uses"
    )


def test_crowds_degenerate_boxes_and_empty_images(tmp_path):
    boxes = [
        {"bbox": [10, 10, 20, 20], "category_id": 1},
        {"bbox": [5, 5, 30, 30], "category_id": 1, "iscrowd": 1},
        {"bbox": [10, 10, 0, 20], "category_id": 2},
        {"bbox": [200, 10, 20, 20], "category_id": 2},  # outside
        {"bbox": [50, 40, 100, 100], "category_id": 2},  # over the border
    ]
    write_coco(tmp_path, num_train=2, annotations={0: boxes, 1: []}, size=(64, 64))
    dataset = build_dataset("val", config_for(tmp_path, *SMALL_IMAGES))
    image, target = dataset[0]
    assert target["labels"].tolist() == [0, 1]
    corners = box_convert(target["boxes"], "cxcywh", "xyxy") * 64
    torch.testing.assert_close(corners, torch.tensor([[10.0, 10, 30, 30], [50, 40, 64, 64]]))
    image, target = dataset[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "LA", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    write_coco(tmp_path, num_train=1)
    gray = Image.new("L", (64, 48), 200)
    image = Image.fromarray(np.full((48, 64), 200 * 257, np.uint16)) if mode == "I;16" else gray.convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    image.save(tmp_path / f"val2017/odd.{suffix}")
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = f"odd.{suffix}"
    path.write_text(json.dumps(content))
    pixels, _ = build_dataset("val", config_for(tmp_path, *SMALL_IMAGES))[0]
    assert pixels.shape[0] == 3
    colour = pixels.float().mean((1, 2)) / 255
    assert colour.max() - colour.min() < 0.02, "gray stays gray"
    assert colour.mean().item() == pytest.approx(200 / 255, abs=0.02), "and as bright as it was"


def test_cache_mode_reads_every_file_once(tmp_path):
    write_coco(tmp_path, num_train=3)
    dataset = build_dataset("val", config_for(tmp_path, *SMALL_IMAGES, "--cache_mode"))
    plain = build_dataset("val", config_for(tmp_path, *SMALL_IMAGES))
    wanted = [plain[i][0] for i in range(3)]
    for file in (tmp_path / "val2017").iterdir():
        file.unlink()
    for i in range(3):
        assert torch.equal(dataset[i][0], wanted[i])


@pytest.mark.parametrize(
    ("images", "batch", "world"), [(10, 2, 1), (10, 2, 2), (11, 3, 3), (7, 2, 4), (1, 4, 2)]
)
def test_evaluation_counts_every_image_once_with_the_same_neighbours(images, batch, world):
    alone = list(EvalBatches(images, batch, 0, 1))
    shared = [list(EvalBatches(images, batch, rank, world)) for rank in range(world)]
    dealt = [shared[k % world][k // world] for k in range(len(alone))]
    assert dealt == alone
    assert sum(map(len, shared)) == len(alone)
    assert [i for group in alone for i in group] == list(range(images))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_order_is_shared_out_without_overlap(world):
    samplers = [TrainBatches(26, 2, rank, world, seed=5) for rank in range(world)]
    steps = [list(s) for s in samplers]
    assert {len(s) for s in steps} == {26 // (2 * world)}
    seen = [i for s in steps for group in s for i in group]
    assert len(seen) == len(set(seen))
    whole = [i for group in TrainBatches(26, 2 * world, 0, 1, seed=5) for i in group]
    mixed = [i for k in range(len(steps[0])) for s in steps for i in s[k]]
    assert mixed == whole, "several processes see the steps that one process with the total batch sees"
    samplers[0].epoch = 1
    assert list(samplers[0]) != steps[0]


def test_loader_pads_and_masks(tmp_path):
    write_coco(tmp_path, num_train=4, size=(40, 64))
    dataset = build_dataset("val", config_for(tmp_path, *SMALL_IMAGES))
    images, targets = collate([(torch.ones(3, 4, 6), {"a": 1}), (torch.ones(3, 5, 2), {"a": 2})])
    assert images.tensors.shape == (2, 3, 5, 6)
    assert (~images.mask).sum((1, 2)).tolist() == [24, 10]
    assert images.tensors.sum((1, 2, 3)).tolist() == [72, 30]
    assert [t["a"] for t in targets] == [1, 2]
    for workers in (0, 2):
        loader = build_loader(dataset, EvalBatches(4, 3, 0, 1), workers, torch.device("cpu"))
        batches = list(loader)
        assert [len(b[0]) for b in batches] == [3, 1]
        assert torch.equal(batches[1][0].tensors[0], dataset[3][0])


def test_items_need_no_ground_truth_and_are_those_of_the_file(tmp_path):
    write_coco(tmp_path, num_train=4, size=(40, 64))
    config = config_for(tmp_path, *SMALL_IMAGES)
    dataset = build_dataset("val", config)
    truth, identity = dataset.coco, dataset.identity()
    del dataset.coco
    for i, image_id in enumerate(dataset.image_ids):
        image, target = dataset[i]
        entries = [entry for entry in truth.imgToAnns[image_id] if not entry["iscrowd"]]
        assert target["labels"].tolist() == [dataset.classes.label_of(e["category_id"]) for e in entries]
        sides = target["orig_size"].flip(0).repeat(2)
        boxes = box_convert(torch.tensor([e["bbox"] for e in entries]), "xywh", "cxcywh") / sides
        torch.testing.assert_close(target["boxes"], boxes)
        assert dataset.file_of(image_id) == tmp_path / "val2017" / truth.imgs[image_id]["file_name"]
    assert dataset.identity() == identity
