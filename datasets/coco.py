"""COCO-format detection data, read through pycocotools."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from datasets.coco_format import read_annotations
from datasets.coco_masks import RunLengths
from datasets.panoptic.format import PanopticSet
from datasets.panoptic.segments import SegmentMasks
from datasets.panoptic.truth import PanopticTruth
from datasets.respell import respell
from datasets.transforms import Area, eval_transform, train_transform
from util.class_map import AUTO, ClassMap
from util.config import DataConfig
from util.data_identity import DataIdentity
from util.errors import UserError
from util.images.files import BadImageError, decode, read_image_file

log = logging.getLogger(__name__)


class CocoDetection(Dataset):
    """(image, target) items of a folder of images and a COCO instances file.

    Items and targets are those of datasets.DetectionData. Crowds, and boxes without width or height,
    are left out.

    Args:
        images: folder of the images. A name that no file in it has may be spelled otherwise, or have
            other folders before it.
        annotations: COCO JSON.
        transform: maps (PIL image, {"boxes", "labels", "area", "iscrowd"}) to the same with an image
            [3, H, W] of uint8, or of normalised floats; with `masks` there are "masks" too.
        classes: labels of the category ids; without it the annotations' categories and
            `num_classes` (see ClassMap.of) make it.
        seed: with the epoch and the index it decides the random choices of `transform` in any
            process: those drawn from torch, from NumPy's global generator and from Python's.
        max_megapixels: larger images are refused before they are decoded.
        masks: targets have masks; every annotation must have a segmentation then.
        panoptic: the content of `annotations` if it is a panoptic file. Its segments are the objects.

    Raises:
        UserError: as the message says; an item whose file can't be used raises BadImageError.
    """

    panoptic: PanopticTruth | None = None

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: Callable,
        *,
        seed: int,
        classes: ClassMap | None = None,
        num_classes: int | str = AUTO,
        max_megapixels: float = DataConfig.max_image_megapixels,
        masks: bool = False,
        panoptic: PanopticSet | None = None,
    ) -> None:
        # annotations, with the names of the files as they are here
        if not images.is_dir():
            raise UserError(f"{images} does not exist; it must be the folder of the images: {_FLAGS}")
        self.images, self.annotations = images, annotations
        self.coco = panoptic.as_instances() if panoptic else read_annotations(annotations)
        for how, count in respell(self.coco.imgs.values(), images).items():
            log.info("%s: %s: %d", annotations, how, count)
        self.image_ids = sorted(self.coco.imgs)
        if not self.image_ids:
            raise UserError(f"{annotations} has no images: {_FLAGS}")
        self._names = [self.coco.imgs[image_id]["file_name"] for image_id in self.image_ids]

        # classes: those given must know all categories
        categories = list(self.coco.cats.values())
        self.classes = classes or ClassMap.of(categories, num_classes, str(annotations))
        if classes:
            classes.check(categories, str(annotations))

        # from here on items need `coco` no more
        entries = [self.coco.imgToAnns[image_id] for image_id in self.image_ids]
        objects = [entry for of_image in entries for entry in of_image]
        self._identity = DataIdentity.of([self.coco.imgs[i] for i in self.image_ids], objects)
        of_objects: RunLengths | SegmentMasks | None = None
        if masks and panoptic:
            of_objects = SegmentMasks.of(objects, panoptic, max_megapixels)
        elif masks:
            of_objects = RunLengths.of(objects, self.coco.imgs, annotations)
        self._objects = _Objects.of(entries, self.classes, of_objects)

        self.epoch = 0
        self._transform, self._seed, self._max_megapixels = transform, seed, max_megapixels
        self._cache: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # the image, and its objects in pixels
        path = self.images / self._names[index]
        image = decode(self._bytes(index), path, self._max_megapixels, self._remedy(index))
        width, height = image.size
        try:
            target = self._objects.target(index, height, width)
        except BadImageError:
            raise
        except ValueError as error:
            raise BadImageError(str(path), str(error), self._remedy(index)) from None

        # seeded per item: the same augmentation for any number of processes and workers, and after
        # a resume
        with _random_choices(_item_seed(self._seed, self.epoch, index)):
            image, target = self._transform(image, target)
        target = _normalized(target, *image.shape[-2:])
        target["image_id"] = torch.tensor([self.image_ids[index]])
        target["orig_size"] = torch.tensor([height, width])
        return image.as_subclass(torch.Tensor), target

    def identity(self) -> DataIdentity:
        """What a checkpoint says of these data."""
        return self._identity

    def file_of(self, image_id: int) -> Path:
        """The path of an image."""
        return self.images / self._names[self.image_ids.index(image_id)]

    def fill_cache(self, leave_out_bad: bool) -> None:
        """Read every file into memory now, because worker processes share what is there.

        Files that can't be read raise BadImageError here or, with `leave_out_bad`, as items.
        """
        for index, name in enumerate(self._names):
            # an item of a bad file raises again, and is then skipped
            try:
                self._cache[name] = self._bytes(index)
            except BadImageError:
                if not leave_out_bad:
                    raise

    def _bytes(self, index: int) -> bytes:
        name = self._names[index]
        if name in self._cache:
            return self._cache[name]
        return read_image_file(self.images / name, self._max_megapixels, self._remedy(index))

    def _remedy(self, index: int) -> str:
        return f"take image {self.image_ids[index]} out of {self.annotations}, or add --on_bad_image skip"


def build(
    image_set: str,
    data: DataConfig,
    seed: int,
    classes: ClassMap | None = None,
    *,
    masks: bool = False,
    panoptic: PanopticSet | None = None,
) -> CocoDetection:
    """The "train" or "val" split in the published folder layout, or where the flags say."""
    # a missing --coco_path is reported before the folder in it
    images = data.images_folder(image_set)
    root = Path(data.coco_path)
    if root in images.parents and not root.is_dir():
        raise UserError(
            f"--coco_path {root} does not exist; it must be a folder with train2017, val2017 and annotations"
        )

    transform = eval_transform(data.eval_size, data.max_size)
    if image_set == "train":
        transform = train_transform(data)
    dataset = CocoDetection(
        images,
        data.annotations_file(image_set),
        transform,
        seed=seed,
        classes=classes,
        num_classes=data.num_classes,
        max_megapixels=data.max_image_megapixels,
        masks=masks,
        panoptic=panoptic,
    )
    if data.cache_mode:
        dataset.fill_cache(leave_out_bad=data.on_bad_image == "skip")
    return dataset


_FLAGS = "check --coco_path, or --train_images, --train_annotations, --val_images and --val_annotations"


@contextlib.contextmanager
def _random_choices(seed: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's generators for the block, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a transform may draw from it
    try:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would visit every device, too
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            # the third word: without it NumPy and Python would draw the same numbers
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32, 1])  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class _Objects:
    """The objects of all images, without crowds, in four arrays.

    A dictionary for each of COCO's 860,000 objects takes gigabytes, in every process: a loader worker
    that only reads one changes its count of references, and so copies its page.

    starts: [images + 1], the first object of each image. boxes: [N, 4] xywh in pixels. masks: with
    --masks those of the N objects.
    """

    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    masks: RunLengths | SegmentMasks | None

    @classmethod
    def of(
        cls,
        entries: Sequence[Sequence[dict[str, Any]]],
        classes: ClassMap,
        masks: RunLengths | SegmentMasks | None,
    ) -> _Objects:
        """Of COCO's annotations of each image."""
        # a crowd's box is not one object; evaluation ignores crowds too
        kept = [[entry for entry in of_image if not entry["iscrowd"]] for of_image in entries]
        objects = [entry for of_image in kept for entry in of_image]
        return cls(
            np.cumsum([0, *map(len, kept)]),
            np.array([entry["bbox"] for entry in objects], np.float32).reshape(-1, 4),
            np.array([classes.label_of(entry["category_id"]) for entry in objects], np.int64),
            np.array([entry["area"] for entry in objects], np.float32),
            masks,
        )

    def target(self, index: int, height: int, width: int) -> dict[str, Any]:
        """The objects of an image, with boxes clamped to it. ValueError: masks are of another size."""
        here = slice(self.starts[index], self.starts[index + 1])
        boxes, labels, areas = (torch.from_numpy(x[here]) for x in (self.boxes, self.labels, self.areas))
        target = {
            "boxes": clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), (height, width)),
            "labels": labels,
            "area": areas,
            "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
            "place": torch.arange(here.start, here.stop),
        }
        target = _without_empty(target)
        places = target.pop("place").tolist()
        if self.masks is not None:
            target["masks"] = Mask(self.masks.decoded(places, height, width))

        # types by which transforms know what to do with them
        boxes = BoundingBoxes(target["boxes"], format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
        return target | {"boxes": boxes, "area": Area(target["area"])}


def _without_empty(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # without the types of the transforms, which are done
    plain = {name: values.as_subclass(torch.Tensor) for name, values in target.items()}
    keep = (plain["boxes"][:, 2:] > plain["boxes"][:, :2]).all(1)
    return {name: values[keep] for name, values in plain.items()}


def _normalized(target: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Boxes in pixels to cxcywh in [0, 1], without those that a crop has emptied."""
    masks = target.pop("masks", None)
    target["place"] = torch.arange(len(target["boxes"]))
    target = _without_empty(target)
    places = target.pop("place")
    sides = torch.tensor([width, height, width, height])
    target["boxes"] = box_convert(target["boxes"], "xyxy", "cxcywh") / sides
    target["size"] = torch.tensor([height, width])
    if masks is not None:
        # megabytes, which are copied only if a mask goes
        kept = masks if len(places) == len(masks) else masks[places]
        target["masks"] = kept.as_subclass(torch.Tensor).view(torch.bool)
    return target


def _item_seed(seed: int, epoch: int, index: int) -> int:
    """Well mixed, so that neighbouring items do not share their choices (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) & (2**64 - 1)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return (x ^ (x >> 31)) & (2**63 - 1)
