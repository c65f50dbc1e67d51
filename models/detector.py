"""A trained detector as a function of images.

detector = load_detector("checkpoint.pth")
for found in detector("street.jpg").above(0.5):
    print(found.name, found.score, found.box)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.masks import ImageMasks
from models.postprocess import PostProcess
from util.class_map import ClassMap
from util.config import Config, DataConfig
from util.errors import UserError
from util.images.prepare import ImageLike, as_picture, prepare
from util.nested_tensor import NestedTensor
from util.step.precision import autocast


class Detection(NamedTuple):
    """One box: x0, y0, x1, y1 in pixels.

    `label` is the index of its logit, `category_id` its id in the annotations.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    label: int
    category_id: int


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The n detections of one image, best first; tensors on the CPU.

    boxes: [n, 4] float32 x0, y0, x1, y1 in pixels of the image that was given; scores: [n] float32
    in [0, 1]; labels: [n] int64 places among the logits; category_ids: [n] int64 ids of the data
    set that the detector was trained on; queries: [n] int64 queries that gave them; names: n names
    of the classes; size: (height, width) of the image; embedded_masks: what `masks` is computed from, None
    without a mask head (--masks).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    category_ids: Tensor
    queries: Tensor
    names: tuple[str, ...]
    size: tuple[int, int]
    embedded_masks: ImageMasks | None = None

    @cached_property
    def masks(self) -> Tensor | None:
        """[n, H, W] bool at the image's size; None without a mask head (--masks).

        Computed when it is first asked for, which takes a byte for every pixel of every detection: call
        `above` before.
        """
        return None if self.embedded_masks is None else self.embedded_masks.all()

    def above(self, score: float) -> Detections:
        """Those that score at least `score`."""
        # a mask would do for tensors, but not for the names
        keep = (self.scores >= score).nonzero().flatten()
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            category_ids=self.category_ids[keep],
            queries=self.queries[keep],
            names=tuple(self.names[i] for i in keep.tolist()),
            embedded_masks=None if self.embedded_masks is None else self.embedded_masks[keep],
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        # plain numbers, not tensors
        columns = (
            self.names,
            self.scores.tolist(),
            self.boxes.tolist(),
            self.labels.tolist(),
            self.category_ids.tolist(),
        )
        for name, score, box, label, category_id in zip(*columns, strict=True):
            yield Detection(name, score, tuple(box), label, category_id)

    def __repr__(self) -> str:
        # a table: name, score, box
        width = max(map(len, self.names), default=0)
        plural = "" if len(self) == 1 else "s"
        lines = [f"{len(self)} detection{plural} on {self.size[1]} x {self.size[0]} pixels (width x height)"]
        for found in self:
            box = ", ".join(f"{x:.1f}" for x in found.box)
            lines.append(f"  {found.name:{width}}  {found.score:.2f}  [{box}]")
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """An image for the network, uint8 [3, H, W] on the CPU, and its original (height, width)."""

    pixels: Tensor
    size: tuple[int, int]


class Detector:
    """Images to detections, with the resizing and 100 best of evaluation.

    Images of a batch are padded to the largest, which changes their detections a little. With
    batch_size 1 the detections of an image do not depend on the others.

    Args:
        model: a DeformableDETR in evaluation mode, on its device; a subclass may have another.
        config: how to resize (eval_size, max_size).
        classes: ids and names of the labels.
        amp: mixed precision, "off", "bf16" or "fp16".
        batch_size: images that the network gets at once, of a list.
        score_threshold: leave out detections that score less, from 0 to 1.
        max_image_megapixels: refuse larger files.
    """

    def __init__(
        self,
        model: Any,
        config: Config,
        classes: ClassMap,
        *,
        amp: str = "off",
        batch_size: int = 1,
        score_threshold: float = 0.0,
        max_image_megapixels: float = DataConfig.max_image_megapixels,
    ) -> None:
        # named as the flags of tools/predict.py
        if batch_size < 1:
            raise UserError(f"--batch_size {batch_size} must be at least 1")
        if not 0 <= score_threshold <= 1:
            raise UserError(f"--score_threshold {score_threshold:g} must be from 0 to 1")
        self.model, self.config, self.classes = model, config, classes
        self.amp, self.batch_size, self.score_threshold = amp, batch_size, score_threshold
        self.max_image_megapixels = max_image_megapixels

    @property
    def device(self) -> torch.device:
        """Where outputs are."""
        return next(self.model.parameters()).device

    def __call__(
        self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]
    ) -> Detections | list[Detections]:
        """Detections of an image, or a list of them for a list or tuple of images.

        util.images.prepare.as_picture says what an image is. A file is turned as its EXIF
        orientation says, and boxes refer to the picture that viewers show.

        Raises:
            UserError (a ValueError): a file or an array can't be used as an image.
            TypeError: it is something else.
        """
        if not isinstance(images, list | tuple):
            return self.detect([self.prepare(images)])[0]
        # batches of at most batch_size
        found = []
        for start in range(0, len(images), self.batch_size):
            found += self.detect([self.prepare(image) for image in images[start : start + self.batch_size]])
        return found

    def prepare(self, image: ImageLike) -> Prepared:
        """An image resized; several threads may do this."""
        picture = as_picture(image, self.max_image_megapixels)
        # the size of evaluation
        data = self.config.data
        return Prepared(prepare(picture, data.eval_size, data.max_size), (picture.height, picture.width))

    @torch.no_grad()
    def detect(self, batch: Sequence[Prepared]) -> list[Detections]:
        """Detections of images that go through the network together."""
        return self.detections(self.outputs(batch), batch)

    @torch.no_grad()
    def outputs(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """What the network gives for images that go through it together (DeformableDETR.forward)."""
        # padded to the largest
        images = NestedTensor.from_images([item.pixels for item in batch]).to(self.device)
        with autocast(self.amp, self.device):
            return self.model(images)

    def detections(self, outputs: dict[str, Any], batch: Sequence[Prepared]) -> list[Detections]:
        """The detections in `outputs` of one stream of `batch`."""
        # boxes in pixels of the image as it was given
        sizes = torch.tensor([item.size for item in batch], device=self.device)
        pairs = zip(self._postprocess(outputs, sizes), batch, strict=True)
        return [self._named(found, item.size).above(self.score_threshold) for found, item in pairs]

    def _postprocess(self, outputs: dict[str, Any], target_sizes: Tensor) -> list[dict[str, Any]]:
        return PostProcess()(outputs, target_sizes)

    def _named(self, found: dict[str, Any], size: tuple[int, int]) -> Detections:
        # float32 on the host, whatever the model computed in
        labels = found["labels"].cpu()
        ids = [self.classes.id_of(label) for label in labels.tolist()]
        return Detections(
            boxes=found["boxes"].float().cpu(),
            scores=found["scores"].float().cpu(),
            labels=labels,
            category_ids=torch.tensor(ids, dtype=torch.int64),
            queries=found["queries"].cpu(),
            names=tuple(self.classes.name_of(label) for label in labels.tolist()),
            size=size,
            embedded_masks=found["masks"].cpu() if "masks" in found else None,
        )
