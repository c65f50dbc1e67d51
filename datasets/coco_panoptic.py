"""COCO's panoptic data as detection data (--dataset_file coco_panoptic): each segment is an object.

Things and stuff have the box of the JSON file and the mask of the map; crowds are left out. Boxes are
compared for things alone, as published; panoptic maps are compared where there are masks.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from datasets import coco
from datasets.coco import CocoDetection
from datasets.panoptic.format import read_panoptic
from datasets.panoptic.truth import PanopticTruth
from util.class_map import ClassMap
from util.config import DataConfig
from util.errors import UserError

log = logging.getLogger(__name__)


def build(
    image_set: str,
    data: DataConfig,
    seed: int,
    classes: ClassMap | None = None,
    *,
    masks: bool = False,
) -> CocoDetection:
    """The "train" or "val" split. Without `masks` it has boxes only, and no map is read."""
    source = read_panoptic(data.annotations_file(image_set))
    if masks:
        source = replace(source, folder=_maps(image_set, data))
    elif image_set == "val":
        log.warning("panoptic data without --masks: boxes of all segments are learnt, and there are no maps")
    dataset = coco.build(image_set, data, seed, classes, masks=masks, panoptic=source)

    known = dataset.classes
    if known.stuff is None:
        stuff = [known.label_of(one["id"]) for one in source.categories if not one["isthing"]]
        dataset.classes = replace(known, stuff=tuple(sorted(stuff)))
    dataset.coco = source.as_instances(only_things=True)
    # the training split is never evaluated, and would keep all segments as dictionaries
    if masks and image_set == "val":
        limits = data.panoptic_score, data.panoptic_overlap, data.max_image_megapixels
        dataset.panoptic = PanopticTruth(source, dataset.classes, *limits)
    return dataset


def _maps(image_set: str, data: DataConfig) -> Path:
    """The folder of the maps: as published, or beside the JSON file, as the archive is unpacked."""
    annotations = data.annotations_file(image_set)
    places = [annotations.with_suffix("")]
    if not getattr(data, f"{image_set}_annotations"):
        places.insert(0, Path(data.coco_panoptic_path or data.coco_path, f"panoptic_{image_set}2017"))
    for place in places:
        if place.is_dir():
            return place
    names = " and ".join(map(str, places))
    raise UserError(
        f"{names} do not exist; one must be the folder of the panoptic maps, PNG files, of {annotations}: "
        f"check --coco_panoptic_path"
    )
