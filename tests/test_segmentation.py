"""Instance segmentation: masks of the data, the head, its losses, a frozen detector, COCO's figures."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import maximum_filter, minimum_filter
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from datasets.coco import CocoDetection
from datasets.coco_eval import evaluate_results
from datasets.coco_masks import _uncompressed, coco_masks
from datasets.synthetic.write import generate
from datasets.transforms import RandomCrop, RandomShorterSide, train_transform
from models import build_model, load_detector, load_model
from models.inference import prepare_for_inference
from models.masks import ImageMasks, cells_of, dice_loss, mask_losses
from models.segmentation import ellipses
from tests.golden import recipe
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, keep_newest, write_coco
from tests.processes import run_main_forked, run_main_together
from tools import draw_detections, predict
from util.checkpoint import read_checkpoint
from util.config import parse_config
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.optim import build_optimizer
from util.step.precision import autocast

WIDTH, HEIGHT = 64, 48
SIZES, COUNTS = [(64, 80), (48, 72), (80, 60)], [3, 0, 5]
RUN = (*SMALL_IMAGES, *SMALL_MODEL, "--num_workers", "0", "--batch_size", "2", "--device", "cpu")


# ---- data


def run_lengths(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    """Run lengths of a mask [H, W] as JSON has them."""
    if compressed:
        runs = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": runs["size"], "counts": runs["counts"].decode()}
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int), [2]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def annotation(segmentation: Any, category: int = 1, **more: Any) -> dict[str, Any]:
    """With the box of its mask."""
    runs = segmentation
    if isinstance(segmentation, list):
        runs = mask_utils.merge(mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH))
    elif isinstance(segmentation["counts"], list):
        runs = mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH)
    box = mask_utils.toBbox(runs).tolist()
    area = float(mask_utils.area(runs))
    return {"bbox": box, "category_id": category, "area": area, "segmentation": segmentation, **more}


def objects() -> list[dict[str, Any]]:
    """Every form of a segmentation: polygons of one and two parts, run lengths of both kinds, a crowd."""
    star = [10.2, 3.1, 24.7, 8.0, 30.3, 22.6, 12.0, 27.9]
    return [
        annotation([star]),
        annotation([[40, 5, 60, 6, 50, 20], [44, 30, 58, 30, 58, 45, 44, 40]], 2),
        annotation(run_lengths(disc(20, 34, 9), True), 3),
        annotation(run_lengths(disc(52, 24, 10), True), 2, iscrowd=1),
        annotation(run_lengths(disc(33, 14, 6), False), 1),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six and four images that tell where each pixel is: x is its red, y its green."""
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder, 6, 4, {i: objects()[i % 2 :] for i in range(6)}, size=(WIDTH, HEIGHT))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    picture = Image.fromarray(np.stack([columns, rows, np.full_like(rows, 100)], -1))
    for path in folder.glob("*2017/*.png"):
        picture.save(path)
    return folder


def dataset(data: Path, transform: Any, masks: bool = True) -> CocoDetection:
    return CocoDetection(
        data / "train2017",
        data / "annotations/instances_train2017.json",
        v2.Compose([transform, v2.ToImage()]),
        seed=1,
        masks=masks,
    )


def whole_masks(source: CocoDetection, index: int) -> list[np.ndarray]:
    """By pycocotools, of the untransformed image."""
    entries = source.coco.imgToAnns[source.image_ids[index]]
    return [source.coco.annToMask(entry) for entry in entries if not entry["iscrowd"]]


@pytest.mark.parametrize(
    "transform",
    [
        v2.Identity(),
        v2.RandomHorizontalFlip(1),
        v2.RandomVerticalFlip(1),
        RandomCrop(20, 40),
        v2.Compose([v2.RandomHorizontalFlip(), RandomCrop(8, 30)]),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_masks_follow_every_pixel(data, transform):
    source = dataset(data, transform)
    kept = 0
    for epoch in range(6):
        source.epoch = epoch
        for index in range(len(source)):
            image, target = source[index]
            x, y = image[0].numpy(), image[1].numpy()
            assert target["masks"].dtype == torch.bool
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
            masks = target["masks"].numpy()
            for mask, (whole, _) in zip(masks, kept_masks(source, index, x, y), strict=True):
                assert np.array_equal(mask, whole[y, x])
            kept += len(masks)
    assert kept


def kept_masks(source: CocoDetection, index: int, x: np.ndarray, y: np.ndarray) -> list[tuple]:
    """Whole masks and labels of the objects whose box is partly in a picture of these places."""
    entries = [e for e in source.coco.imgToAnns[source.image_ids[index]] if not e["iscrowd"]]
    kept = []
    for entry, whole in zip(entries, whole_masks(source, index), strict=True):
        left, top, width, height = entry["bbox"]
        across = left < x.max() + 1 and left + width > x.min()
        if across and top < y.max() + 1 and top + height > y.min():
            kept.append((whole, source.classes.label_of(entry["category_id"])))
    return kept


def test_the_published_augmentation_keeps_masks_under_their_pixels(data):
    """Flip, resize, crop, resize: wherever a mask does not change within two pixels."""
    flags = ("--coco_path", str(data), *SMALL_IMAGES, "--crop_resize_sizes", "56", "100")
    source = dataset(data, train_transform(parse_config(flags).data))
    sure = inside = 0
    for epoch in range(8):
        source.epoch = epoch
        for index in range(len(source)):
            image, target = source[index]
            x, y = (image[channel].numpy().astype(int) for channel in (0, 1))
            kept = kept_masks(source, index, x, y)
            if len(kept) != len(target["labels"]):
                continue  # of a box only a rim is left, or not, by rounding
            assert target["labels"].tolist() == [label for _, label in kept]
            for mask, (whole, _) in zip(target["masks"].numpy(), kept, strict=True):
                least, most = (
                    change(whole, 5, mode="nearest") for change in (minimum_filter, maximum_filter)
                )
                clear = least[y, x] == most[y, x]
                assert np.array_equal(mask[clear], whole[y, x][clear])
                sure, inside = sure + clear.sum(), inside + mask[clear].sum()
    assert sure > 1e5
    assert inside > 0.02 * sure


def test_resized_masks_are_what_lies_under_the_pixel(data):
    source = dataset(data, RandomShorterSide([90], 200))
    image, target = source[0]
    height, width = image.shape[1:]
    assert (height, width) == (90, 120)
    rows = (np.arange(height) + 0.5) * HEIGHT // height
    columns = (np.arange(width) + 0.5) * WIDTH // width
    for mask, whole in zip(target["masks"].numpy(), whole_masks(source, 0), strict=True):
        assert np.array_equal(mask, whole[rows.astype(int)][:, columns.astype(int)])


def test_a_flip_and_a_resize_change_places(data):
    resize = RandomShorterSide([75], 200)
    flipped = dataset(data, v2.Compose([v2.RandomHorizontalFlip(1), resize]))[0][1]["masks"]
    plain = dataset(data, resize)[0][1]["masks"]
    different = (flipped.flip(-1) != plain).float().mean()
    assert different < 0.002, "only where two pixels are equally near"


def test_without_masks_items_are_the_same(data):
    transform = v2.Compose([v2.RandomHorizontalFlip(), RandomCrop(20, 40), RandomShorterSide([48], 96)])
    with_masks, without = (dataset(data, transform, masks)[1] for masks in (True, False))
    assert torch.equal(with_masks[0], without[0])
    assert with_masks[1].keys() - without[1].keys() == {"masks"}
    assert all(torch.equal(with_masks[1][name], value) for name, value in without[1].items())


GOOD = run_lengths(disc(20, 20, 9), True)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[]],
        "polygon",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, math.inf]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 1e9, 4, 5, 6]],
        {"size": [HEIGHT, WIDTH]},
        {**GOOD, "size": [WIDTH, HEIGHT]},
        {**GOOD, "counts": GOOD["counts"][:-1]},
        {**GOOD, "counts": ""},
        {**GOOD, "counts": "~~~~"},
        {**GOOD, "counts": "oooooooooooooooooo0"},
        {**GOOD, "counts": [10, 20]},
        {**GOOD, "counts": [-10, HEIGHT * WIDTH + 10]},
        {**GOOD, "counts": [HEIGHT * WIDTH / 2] * 2},
    ],
    ids=str,
)
def test_an_annotation_without_a_usable_segmentation(segmentation, tmp_path):
    entry = {"bbox": [1, 2, 9, 9], "category_id": 1, "segmentation": segmentation}
    if segmentation is None:
        del entry["segmentation"]
    write_coco(tmp_path, 1, annotations={0: [*objects(), entry]}, size=(WIDTH, HEIGHT))
    with pytest.raises(UserError, match=r"instances_train2017.json: annotation 6 .*--masks") as error:
        dataset(tmp_path, v2.Identity())
    assert "\n" not in str(error.value)
    dataset(tmp_path, v2.Identity(), masks=False)


def test_a_picture_of_another_size_than_its_masks(tmp_path):
    write_coco(tmp_path, 1, annotations={0: objects()}, size=(WIDTH, HEIGHT))
    Image.new("RGB", (50, 40)).save(tmp_path / "train2017/000000.png")
    with pytest.raises(UserError, match=r"000000.png is 50 x 40 pixels .* its masks are 64 x 48"):
        dataset(tmp_path, v2.Identity())[0]


def test_compressed_run_lengths():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 90, 2)
        kind = rng.choice([0.5, 0.01, 0.99, 0.0, 1.0])
        mask = (rng.random((height, width)) < kind).astype(np.uint8)
        if rng.random() < 0.5:
            mask = np.repeat(np.repeat(mask, 9, 0), 7, 1)
        runs = mask_utils.encode(np.asfortranarray(mask))
        counts = _uncompressed(np.frombuffer(runs["counts"], np.uint8)).tolist()
        assert counts == run_lengths(mask, False)["counts"]


# ---- losses


def test_cells_are_shares_of_the_pixels():
    mask = torch.zeros(1, 6, 9, dtype=torch.bool)
    mask[0, :4, :2] = True
    mask[0, 4, 8] = True
    cells = cells_of(mask, (3, 4), torch.float32)
    wanted = torch.tensor([[[0.5, 0, 0, 0], [0, 0, 1 / 16, 0], [0, 0, 0, 0]]])
    assert torch.equal(cells, wanted)
    assert cells_of(mask[:0], (3, 4), torch.float32).shape == (0, 3, 4)


def test_losses_by_hand():
    """One query of two is matched with a mask of one of two cells; products are 0 and log 3."""
    pixels = torch.tensor([[[[0.0, 1.0]]]], requires_grad=True)
    queries = torch.tensor([[[9.0], [math.log(3)]]], requires_grad=True)
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    losses = mask_losses(pixels, queries, [mask], [1], torch.tensor([1]), torch.tensor([0]))
    # probabilities 0.5 and 0.75, wanted 0 and 1
    focal = (0.75 * 0.5**2 * math.log(2) + 0.25 * 0.25**2 * math.log(4 / 3)) / 2
    assert losses["loss_mask"].item() == pytest.approx(focal, rel=1e-6)
    assert losses["loss_dice"].item() == pytest.approx(1 - (2 * 0.75 + 1) / (0.5 + 0.75 + 1 + 1), rel=1e-6)
    assert dice_loss(torch.full((1, 2, 2), 50.0), torch.ones(1, 2, 2)).item() == 0
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert queries.grad[0, 0] == 0
    assert queries.grad[0, 1] != 0


def test_losses_of_a_batch_are_the_sums_of_those_of_its_images():
    """Two streams, images without targets, and one with more targets than queries."""
    generator = torch.Generator().manual_seed(0)
    counts = [2, 0, 5]
    pixels, queries = (torch.randn(shape, generator=generator) for shape in ((6, 8, 5, 6), (6, 4, 8)))
    masks = [torch.rand(n, 18, 22, generator=generator) < 0.4 for n in counts]
    # four queries an image; pairs of the six images
    query = torch.tensor([3, 1, 8, 9, 10, 11, 12, 13, 20, 23, 22, 21])
    target = torch.tensor([0, 1, 2, 3, 4, 6, 8, 7, 9, 10, 11, 13])
    together = mask_losses(pixels, queries, masks, counts * 2, query, target)
    sums = {"loss_mask": 0.0, "loss_dice": 0.0}
    all_masks = torch.cat(masks * 2)
    for q, t in zip(query.tolist(), target.tolist(), strict=True):
        one = (
            pixels[q // 4 : q // 4 + 1],
            queries[q // 4 : q // 4 + 1, q % 4 : q % 4 + 1],
            [all_masks[t : t + 1]],
        )
        losses = mask_losses(*one, [1], torch.tensor([0]), torch.tensor([0]))
        sums = {name: value + losses[name].item() for name, value in sums.items()}
    assert {name: value.item() for name, value in together.items()} == pytest.approx(sums, rel=1e-5)


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_the_losses_read_nothing_from_the_device():
    pixels, queries = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    masks = [torch.rand(n, 18, 22) < 0.4 for n in (2, 1)]
    pairs = torch.tensor([3, 1, 6]), torch.tensor([0, 1, 2])
    with Operators() as called:
        losses = mask_losses(pixels, queries, masks, [2, 1], *pairs)
        (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert "avg_pool2d" in called.names
    assert not called.names & {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


# ---- the model


def build(*flags: str):
    torch.manual_seed(0)
    return build_model(parse_config([*SMALL_MODEL, *flags]))


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    targets = recipe.targets(SIZES, COUNTS, num_classes=4)
    for target, count, size in zip(targets, COUNTS, SIZES, strict=True):
        target["masks"] = torch.rand(count, *size, generator=generator) < 0.5
    return recipe.images(SIZES), targets


ARCHITECTURES = {
    "plain": (),
    "refine": ("--with_box_refine",),
    "two_stage": ("--with_box_refine", "--two_stage"),
    "single_scale": ("--num_feature_levels", "1"),
    "dc5": ("--num_feature_levels", "1", "--dilation", "--backbone", "resnet50"),
    "two_streams": BATCHFORMER,
    "one_stream": ("--bf", "7", "--insert_idx", "0"),
    "checkpointed": ("--checkpoint_encoder", *BATCHFORMER),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_outputs_and_gradients_in_every_architecture(kind):
    model, criterion, postprocessors = build("--masks", *ARCHITECTURES[kind])
    images, targets = batch()
    outputs = model.train()(images)
    streams = outputs["num_streams"]
    assert streams == (2 if BATCHFORMER[0] in ARCHITECTURES[kind] and kind != "one_stream" else 1)
    assert outputs["pixel_embed"].shape == (3 * streams, 37, 20, 20)
    assert outputs["mask_embed"].shape == (3 * streams, 12, 37)
    assert outputs["image_sizes"].tolist() == [list(size) for size in SIZES] * streams
    losses = criterion(outputs, targets)
    assert {"loss_mask", "loss_dice"} <= criterion.weight_dict.keys()
    assert not any(re.match(r"loss_(mask|dice)_", name) for name in losses)
    criterion.total(losses).backward()
    for name, parameter in model.mask_head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name

    with torch.no_grad():
        outputs = model.eval()(images)
    detections = postprocessors["bbox"](outputs, torch.tensor([[100, 130], [48, 72], [33, 21]]))
    assert [tuple(image["masks"].all().shape[1:]) for image in detections] == [(100, 130), (48, 72), (33, 21)]
    assert all(len(image["masks"]) == len(image["scores"]) for image in detections)


def test_the_plain_stream_of_training_has_the_masks_of_training_without_batchformer():
    with_bf, without = build("--masks", *BATCHFORMER)[0], build("--masks")[0]
    for model in (with_bf, without):
        recipe.fill(model)
        recipe.no_dropout(model)
    without.load_state_dict(with_bf.state_dict(), strict=False)
    ours, plain = with_bf.train()(batch()[0]), without.train()(batch()[0])
    for name in ("pixel_embed", "mask_embed"):
        half, mixed = ours[name].chunk(2)
        torch.testing.assert_close(half, plain[name], atol=1e-4, rtol=1e-4)
        assert (mixed - plain[name]).abs().max() > 1e-3


@torch.no_grad()
def test_a_mask_begins_as_the_ellipse_in_its_box():
    """Without what the network has learnt, on an image with padding, and for a box of no size."""
    boxes = torch.tensor([[[0.5, 0.25, 0.4, 0.3], [0.9, 0.9, 0.5, 0.0]]])
    pixels, queries = ellipses(boxes, torch.tensor([[400, 600]]), (120, 160))
    masks = ImageMasks(queries[0], pixels[0], torch.tensor([400, 600]), torch.tensor([400, 600])).all()
    y, x = torch.meshgrid(torch.arange(0.5, 400), torch.arange(0.5, 600), indexing="ij")
    for mask, (cx, cy, width, height), iou in zip(
        masks, [(300, 100, 240, 120), (540, 360, 300, 8)], (0.97, 0.7), strict=True
    ):
        wanted = ((x - cx) / (width / 2)) ** 2 + ((y - cy) / (height / 2)) ** 2 < 1
        assert (mask & wanted).sum() / (mask | wanted).sum() > iou

    # of the network too, where nothing was learnt: the logit in the middle of a box
    model = build("--masks", "--with_box_refine")[0]
    for layer in (model.mask_head.pixel_embed, model.mask_head.mask_embed.layers[-1]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    outputs = model.eval()(batch()[0])
    logits = torch.einsum("bqe,behw->bqhw", outputs["mask_embed"], outputs["pixel_embed"])
    for image, boxes, size in zip(logits, outputs["pred_boxes"], SIZES, strict=True):
        for mask, (cx, cy, width, height) in zip(image, boxes.tolist(), strict=True):
            if min(width * size[1], height * size[0]) > 16:
                assert mask[int(cy * size[0] / 4), int(cx * size[1] / 4)] > 1


def test_a_batch_without_objects_gives_the_head_gradients_of_zero():
    model, criterion, _ = build("--masks")
    images, targets = batch()
    empty = [{name: value[:0] for name, value in target.items()} for target in targets]
    criterion.total(criterion(model(images), empty)).backward()
    assert all(not p.grad.any() for p in model.mask_head.parameters())


def test_all_other_weights_begin_as_without_masks():
    with_masks, without = build("--masks")[0].state_dict(), build()[0].state_dict()
    assert {name for name in with_masks.keys() - without.keys() if not name.startswith("mask_head.")} == set()
    assert all(torch.equal(with_masks[name], tensor) for name, tensor in without.items())


@torch.no_grad()
def test_boxes_are_those_of_the_detector_without_the_head():
    with_masks, without = build("--masks")[0].eval(), build()[0].eval()
    ours, plain = with_masks(batch()[0]), without(batch()[0])
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(ours[name], plain[name])


@torch.no_grad()
def test_prepared_weights_compute_the_same_bits():
    plain, prepared = build("--masks")[0].eval(), build("--masks")[0]
    prepare_for_inference(prepared, "bf16")
    with autocast("bf16", torch.device("cpu")):
        ours, others = (model(batch()[0]) for model in (prepared, plain))
    for name in ("pixel_embed", "mask_embed"):
        assert torch.equal(ours[name], others[name])
    assert ours["mask_embed"].dtype == torch.float32


# ---- masks of detections


def embedded(image_size: tuple[int, int], target: tuple[int, int], n: int = 5, padded=None) -> ImageMasks:
    generator = torch.Generator().manual_seed(0)
    height, width = padded or image_size
    pixels = torch.randn(8, -(-height // 4), -(-width // 4), generator=generator)
    queries = torch.randn(n, 8, generator=generator)
    return ImageMasks(queries, pixels, torch.tensor(image_size), torch.tensor(target))


def test_masks_on_the_image_are_the_products_enlarged():
    masks = embedded((40, 64), (80, 128))
    logits = torch.einsum("ne,ehw->nhw", masks.mask_embed, masks.pixel_embed)
    wanted = F.interpolate(logits[None], scale_factor=8, mode="bilinear", align_corners=False)[0] > 0
    assert (masks.all() == wanted).float().mean() > 0.9999
    assert torch.equal(torch.cat(list(masks.chunks())), masks.all())


@pytest.mark.parametrize("size", [(40, 64), (37, 61)])
def test_what_lies_on_padding_changes_no_mask(size):
    """Also where an image ends within a cell, which then counts as far as the image reaches."""
    masks = embedded(size, (111, 77), padded=(64, 96))
    other = embedded(size, (111, 77), padded=(64, 96))
    other.pixel_embed[:, -(-size[0] // 4) :] = 1e9
    other.pixel_embed[:, :, -(-size[1] // 4) :] = -1e9
    assert torch.equal(masks.all(), other.all())
    assert torch.equal(masks.cpu().all(), masks.all())
    # a point in the image is the same point in the mask
    ramp = torch.arange(24.0).expand(1, 16, 24) * 4 + 2
    where = ImageMasks(
        torch.ones(1, 2), torch.cat([ramp, torch.full_like(ramp, -30.0)]), masks.image_size, masks.target_size
    )
    first = int(where.all()[0, 50].nonzero()[0])
    assert first == math.floor(30 * 77 / size[1] - 0.5) + 1


def test_chosen_masks_and_none():
    masks = embedded((40, 64), (30, 20))
    keep = torch.tensor([3, 1])
    assert torch.equal(masks[keep].all(), masks.all()[keep])
    assert masks[keep[:0]].all().shape == (0, 30, 20)
    assert coco_masks(masks[keep[:0]].chunks()) == []


def test_run_lengths_of_results():
    masks = embedded((40, 64), (33, 57))
    for runs, mask in zip(coco_masks(masks.chunks()), masks.all().numpy(), strict=True):
        assert json.loads(json.dumps(runs)) == runs
        assert np.array_equal(mask_utils.decode(runs), mask)


def test_a_large_image_takes_bounded_memory():
    """100 masks of 4000 x 3000 would be 4.5 GiB as float32, and 1.1 GiB as bool."""
    code = (
        "import resource, torch; from datasets.coco_masks import coco_masks; "
        "from models.masks import ImageMasks; torch.set_num_threads(1); "
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20; "
        "of = ImageMasks(torch.randn(100, 128), torch.randn(128, 50, 67).repeat_interleave(4, 1)"
        ".repeat_interleave(4, 2), torch.tensor([800, 1066]), torch.tensor([3000, 4000])); before = used(); "
        "assert len(coco_masks(of.chunks())) == 100; print(used() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5, "GiB"


# ---- COCO's figures


def by_hand(truth: COCO, results: list[dict[str, Any]]) -> COCOeval:
    """pycocotools by itself: masks alone, so that areas are those of masks."""
    masks = [{name: value for name, value in entry.items() if name != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(masks), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("evaluator", ["faster", "pycocotools"])
def test_figures_of_masks(data, evaluator):
    """Objects moved by some pixels, more detections than objects, crowds among them."""
    truth = dataset(data, v2.Identity()).coco
    rng = np.random.default_rng(0)
    results = []
    for entry in truth.dataset["annotations"] * 3:
        mask = np.roll(truth.annToMask(entry), rng.integers(-3, 4, 2), (0, 1))
        runs = run_lengths(mask, True)
        box = mask_utils.toBbox(runs).tolist()
        more = {"image_id": entry["image_id"], "category_id": int(rng.integers(1, 4))}
        results.append({**more, "bbox": box, "segmentation": runs, "score": float(rng.random())})
    results.sort(key=lambda result: result["image_id"])
    ours, theirs = evaluate_results(truth, results, evaluator, "segm"), by_hand(truth, results)
    assert np.array_equal(ours.stats, theirs.stats)
    assert np.array_equal(ours.eval["precision"], theirs.eval["precision"])
    assert 0 < ours.stats[0] < 1
    assert all("bbox" in result for result in results)


# ---- runs


@pytest.fixture(scope="module")
def detector(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without masks."""
    out = tmp_path_factory.mktemp("detector")
    flags = ("--coco_path", str(data), "--epochs", "1", "--output_dir", str(out), "--backbone_norm", "bn")
    result = run_main_forked(*RUN, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def with_masks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with masks and BatchFormerV2, saved within its second epoch too."""
    out = tmp_path_factory.mktemp("masks")
    flags = ("--coco_path", str(data), "--epochs", "2", "--output_dir", str(out), "--save_every", "2")
    result = run_main_forked(*RUN, *flags, *BATCHFORMER, "--masks", "--ema_decay", "0.9")
    assert (result.returncode, result.stderr) == (0, "")
    return out


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def test_a_frozen_detector_stays_as_it_is(detector, data, tmp_path):
    """Its batch norm and its boxes, to the byte; the head learns. The architecture is the file's."""
    out = tmp_path / "out"
    flags = ("--coco_path", str(data), "--output_dir", str(out), "--device", "cpu", "--num_workers", "0")
    flags += (*SMALL_IMAGES, "--masks", "--frozen_weights", str(detector / "checkpoint.pth"))
    result = run_main_forked(*flags, "--epochs", "2", "--clip_max_norm", "0", "--keep", "5")
    assert (result.returncode, result.stderr) == (0, "")
    assert "mask head: initialised; the checkpoint has none" in result.stdout

    before, after = weights_of(detector / "checkpoint.pth"), weights_of(out / "checkpoint.pth")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    first = weights_of(out / "resume_0001_000000000.pth")
    new = [name for name in after if name not in before]
    assert new and all(name.startswith("mask_head.") for name in new)
    assert all(not torch.equal(after[name], first[name]) for name in new)

    boxes, with_masks = (json.loads((folder / "eval/latest.json").read_text()) for folder in (detector, out))
    assert all(result.pop("segmentation") for result in with_masks)
    assert json.dumps(with_masks) == json.dumps(boxes)
    assert lines_of(out)[-1]["test_coco_eval_bbox"] == lines_of(detector)[-1]["test_coco_eval_bbox"]

    # the same command continues, and without its flag it can't
    result = run_main_forked(*flags, "--epochs", "3", "--resume", "auto")
    assert (result.returncode, result.stderr) == (0, "")
    same = ("--num_classes", "4")
    result = run_main_forked(*flags[:-2], *same, "--epochs", "4", "--resume", "auto")
    assert result.returncode == 2
    assert "--frozen_weights was" in result.stderr


def test_a_frozen_detector_of_other_classes(detector, tmp_path):
    write_coco(tmp_path, 2, annotations=dict.fromkeys(range(2), objects()), size=(WIDTH, HEIGHT))
    for path in (tmp_path / "annotations").glob("*.json"):
        path.write_text(path.read_text().replace('"three"', '"four"'))
    flags = ("--coco_path", str(tmp_path), "--masks", "--frozen_weights", str(detector / "checkpoint.pth"))
    result = run_main_forked(*flags, *SMALL_IMAGES, "--device", "cpu", "--num_workers", "0")
    assert result.returncode == 2
    assert "category 3 'four', which is not among the classes that the detector is for" in result.stderr
    result = run_main_forked(*flags, *SMALL_IMAGES, "--device", "cpu", "--num_classes", "9")
    assert result.returncode == 2
    assert "other classes" in result.stderr and "--finetune" in result.stderr


def test_a_run_writes_masks_and_their_figures(with_masks, data):
    line = lines_of(with_masks)[-1]
    for prefix in ("test", "test_ema"):
        assert len(line[f"{prefix}_coco_eval_masks"]) == len(line[f"{prefix}_coco_eval_bbox"]) == 12
    assert {"train_loss_mask", "train_loss_dice", "test_loss_mask", "test_loss_dice"} <= line.keys()
    results = json.loads((with_masks / "eval/latest.json").read_text())
    assert list(results[0]) == ["image_id", "category_id", "bbox", "segmentation", "score"]
    assert results[0]["segmentation"]["size"] == [HEIGHT, WIDTH]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(data / "annotations/instances_val2017.json")
    by_coco = by_hand(truth, results)
    assert by_coco.stats.tolist() == line["test_coco_eval_masks"]
    tables = read_checkpoint(with_masks / "eval/latest.pth", "tables")
    assert np.array_equal(tables["segm"]["precision"].numpy(), by_coco.eval["precision"])
    assert tables["segm"]["stats"] == line["test_coco_eval_masks"]
    assert tables["stats"] == line["test_coco_eval_bbox"]
    keys = ("test_coco_eval_masks", "test_ema_coco_eval_masks")
    best = max(line[key][0] for line in lines_of(with_masks) for key in keys)
    assert read_checkpoint(with_masks / "checkpoint.pth")["history"]["best"]["mask AP"] == best


def test_figures_do_not_depend_on_the_number_of_processes(with_masks, data, tmp_path):
    flags = ("--coco_path", str(data), "--resume", str(with_masks / "checkpoint.pth"), "--eval")
    files = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        where = ("--output_dir", str(out), "--save_predictions", "--num_workers", "0", "--device", "cpu")
        run_main_together(*flags, *where, processes=processes, output=tmp_path / f"logs{processes}")
        files[processes] = (out / "predictions.json").read_bytes()
    assert files[1] == files[2]
    # the detections of the training's own evaluation
    assert json.loads(files[1]) == json.loads((with_masks / "eval/latest.json").read_text())


def test_an_interrupted_run_goes_on_exactly(with_masks, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(with_masks, out)
    newest = keep_newest(out, "resume_0001_*.pth")
    flags = ("--coco_path", str(data), "--epochs", "2", "--output_dir", str(out), "--save_every", "2")
    result = run_main_forked(*RUN, *flags, *BATCHFORMER, "--masks", "--ema_decay", "0.9", "--resume", "auto")
    assert (result.returncode, result.stderr) == (0, "")
    assert newest.name in result.stdout
    whole, resumed = (weights_of(folder / "checkpoint.pth") for folder in (with_masks, out))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_load_detector_has_masks(with_masks, detector, data):
    picture = data / "val2017/000000.png"
    found = load_detector(with_masks / "checkpoint.pth")(picture)
    assert "masks" not in vars(found), "they are computed when they are asked for"
    assert found.masks.shape == (len(found), HEIGHT, WIDTH)
    assert found.masks.dtype == torch.bool
    assert found.masks is found.masks
    best = found.above(float(found.scores[2]))
    assert 0 < len(best) < len(found)
    assert torch.equal(best.masks, found.masks[: len(best)])
    assert found.above(1.0).masks.shape == (0, HEIGHT, WIDTH)
    assert load_detector(detector / "checkpoint.pth")(picture).masks is None


def test_predictions_and_pictures_have_masks(with_masks, data, tmp_path):
    """Those of load_detector; and the results can be drawn beside the annotations."""
    pictures = sorted((data / "val2017").iterdir())[:2]
    command = ["--resume", with_masks / "checkpoint.pth", *pictures, "--output_dir", tmp_path / "out"]
    predict.main([*map(str, command), "--device", "cpu", "--score_threshold", "0"])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    found = load_detector(with_masks / "checkpoint.pth")(pictures[0]).above(0)
    first = [result for result in results if result["image_id"] == results[0]["image_id"]]
    assert len(first) == len(found) > 0
    for result, mask in zip(first, found.masks.numpy(), strict=True):
        assert np.array_equal(mask_utils.decode(result["segmentation"]), mask)

    # the results of the run, which have the ids of the annotations
    folders = ["--annotations", data / "annotations/instances_val2017.json", "--images", data / "val2017"]
    detections = with_masks / "eval/latest.json"
    for name, content in (("masks", detections), ("boxes", tmp_path / "boxes.json")):
        if name == "boxes":
            entries = json.loads(detections.read_text())
            content.write_text(json.dumps([{**entry, "segmentation": None} for entry in entries]))
            content.write_text(content.read_text().replace(', "segmentation": null', ""))
        flags = ["--predictions", content, "--output_dir", tmp_path / name, "--score_threshold", "0"]
        draw_detections.main([*map(str, [*folders, *flags])])
    drawn = [(tmp_path / name / "contact_sheet.png").read_bytes() for name in ("masks", "boxes")]
    assert drawn[0] != drawn[1]


def test_the_weights_say_whether_there_are_masks(with_masks, detector, data):
    file = with_masks / "checkpoint.pth"
    assert load_model(file, coco_path=data)[3].segmentation.masks
    with pytest.raises(UserError, match="leave out --masks"):
        load_model(detector / "checkpoint.pth", masks=True)
    result = run_main_forked(
        "--coco_path", str(data), "--resume", str(detector / "checkpoint.pth"), "--eval", "--masks"
    )
    assert (result.returncode, "leave out --masks" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("detector", ("--masks",), "mask head: initialised; the checkpoint has none"),
        ("with_masks", ("--masks",), ""),
        ("with_masks", (), "mask head: left out; --masks keeps it"),
    ],
)
def test_fine_tuning(kind, flags, says, data, request):
    checkpoint = str(request.getfixturevalue(kind) / "checkpoint.pth")
    run = (*SMALL_IMAGES, "--coco_path", str(data), "--num_workers", "0", "--device", "cpu", "--epochs", "1")
    result = run_main_forked(*run, "--finetune", checkpoint, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("mask head" in result.stdout) == bool(says)
    assert says in result.stdout
    assert ("masks:" in result.stdout) == bool(flags)


# ---- learning


def test_masks_are_learned(tmp_path):
    """Four pictures by heart: the dice loss falls to less than half."""
    generate(tmp_path / "data", train_images=4, val_images=0, image_size=64, max_objects=2)
    config = parse_config([*SMALL_MODEL, "--masks", "--num_classes", "5", "--dropout", "0", "--lr", "1e-3"])
    source = CocoDetection(
        tmp_path / "data/train2017",
        tmp_path / "data/annotations/instances_train2017.json",
        v2.ToImage(),
        seed=0,
        masks=True,
    )
    images, targets = zip(*[source[i] for i in range(4)], strict=True)
    torch.manual_seed(0)
    model, criterion, _ = build_model(config, source.classes)
    optimizer = build_optimizer(model.train(), config)
    batch = NestedTensor.from_images(images)
    course = []
    for _ in range(60):
        losses = criterion(model(batch), targets)
        criterion.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        course.append(losses["loss_dice"].item())
    assert np.mean(course[-5:]) < 0.5 * course[0]
