"""Evaluation of panoptic maps: an image's map of detections beside its true one, and the figures of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.panoptic.format import Panoptic, PanopticSet
from datasets.panoptic.merge import panoptic_of
from datasets.panoptic.quality import compare, panoptic_quality, statistics
from util.class_map import ClassMap


@dataclass(frozen=True)
class PanopticTruth:
    """The true maps of a data set, and how maps are made of detections.

    data: the maps. classes: of the detector. score, overlap, megapixels: --panoptic_score,
    --panoptic_overlap, --max_image_megapixels.
    """

    data: PanopticSet
    classes: ClassMap
    score: float
    overlap: float
    megapixels: float

    def compare(self, image_id: int, detection: Mapping[str, Any]) -> np.ndarray:
        """What became of the segments of an image: [n] of quality.OUTCOME.

        Args:
            detection: its scores [n], labels [n] and masks, as `panoptic_of` takes them.

        Raises:
            UserError: the true map can't be read.
        """
        found = panoptic_of(
            detection["scores"],
            detection["labels"],
            detection["masks"],
            self.classes,
            score_threshold=self.score,
            overlap_threshold=self.overlap,
        )
        return compare(self.data.read(image_id, self.megapixels), found)

    def figures(self, outcomes: Mapping[int, np.ndarray]) -> dict[str, dict[str, float]]:
        """PQ_all, PQ_th and PQ_st of the data set from the outcomes by image id.

        An image without an entry could not be read: all its segments count as missed.
        """
        # in one order: sums must not depend on who had which image
        in_order = [
            outcomes[image_id] if image_id in outcomes else self._missed(image_id)
            for image_id in sorted(self.data.images)
        ]
        categories = self.data.categories
        return panoptic_quality(statistics(np.concatenate(in_order), categories), categories)

    def _missed(self, image_id: int) -> np.ndarray:
        """The outcomes of an image for which there are no detections; its map is not read."""
        segments = self.data.annotations[image_id]["segments_info"]
        ids = np.array([[segment["id"] for segment in segments]], np.int32)
        return compare(Panoptic(ids, segments), Panoptic(np.zeros_like(ids), []))
