"""Data sets, transforms, loading and COCO evaluation. It knows nothing of models.

The training loop, main.py and the tools use this room.

A format of data sets is one module and one entry of FORMATS. The module has a function
`build(image_set, config.data, seed, classes)`, which returns a DetectionData. With --masks it is called
with `masks=True` too.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from util.errors import UserError

if TYPE_CHECKING:  # datasets.synthetic starts without torch
    from pycocotools.coco import COCO
    from torch import Tensor

    from datasets.panoptic.truth import PanopticTruth
    from util.class_map import ClassMap
    from util.data_identity import DataIdentity

# --dataset_file -> module
FORMATS = {"coco": "datasets.coco", "coco_panoptic": "datasets.coco_panoptic"}


class DetectionData(Protocol):
    """What training and evaluation use of a data set: (image, target) items, and the attributes here.

    An item is an RGB image [3, H, W] of uint8, which the detector normalises on its device, or of
    normalised floats; and a target with `boxes` [n, 4] cxcywh in [0, 1], `labels` [n] int64, `area` [n],
    `iscrowd` [n], `image_id` [1], `orig_size` and `size` [2] (height, width). With --masks also `masks`
    [n, H, W] bool of the image.
    It raises BadImageError for a file that can't be used.

    epoch: set before each epoch; random choices depend on it, the seed and the index alone.
    classes: labels <-> category ids. coco: ground truth, as evaluation compares it; a training
    deletes that of its training split. panoptic: what panoptic maps are compared with; None without such.
    images, annotations: folder and file, for messages. image_ids: in the order of the items.
    """

    epoch: int
    classes: ClassMap
    coco: COCO
    panoptic: PanopticTruth | None
    images: Path
    annotations: Path
    image_ids: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]: ...

    def identity(self) -> DataIdentity: ...

    def file_of(self, image_id: int) -> Path: ...


def build_dataset(image_set: str, config: Any, classes: ClassMap | None = None) -> DetectionData:
    """The "train" or "val" data set of a Config: (image, target) items, transformed.

    `classes` is the ClassMap to label by, that of the training data or of a checkpoint; without it,
    and without classes in the Config, the annotations and --num_classes decide.

    Raises:
        UserError: --dataset_file is unknown; a folder or file is missing or unusable, or its
        categories fit neither `classes` nor --num_classes.
    """
    # imported when it is used: datasets.synthetic starts without torch
    name = config.data.dataset_file
    if name not in FORMATS:
        raise UserError(f"--dataset_file {name!r} is unknown; use {' or '.join(FORMATS)}")
    module = import_module(FORMATS[name])
    options = {"masks": True} if config.segmentation.masks else {}
    return module.build(image_set, config.data, config.run.seed, classes or config.classes, **options)
