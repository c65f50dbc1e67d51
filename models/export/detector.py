"""An exported file as a function of images, as models.detector.Detector is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.detector import Detector, Prepared
from models.export.runtime import open_exported
from models.masks import ImageMasks
from models.postprocess import PostProcess
from models.weights.architecture import as_given
from util.class_map import ClassMap
from util.config import flags_of
from util.errors import UserError
from util.nested_tensor import NestedTensor


class ExportedDetector(Detector):
    """A Detector whose `model` is an ExportedFile. Outputs are on the CPU, wherever the file runs."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @torch.no_grad()
    def outputs(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        """What the file gives, and `image_sizes` [B, 2] of the resized images."""
        images = NestedTensor.from_images([item.pixels for item in batch]).tensors.contiguous()
        sizes = torch.tensor([item.pixels.shape[1:] for item in batch])
        return {**self.model.run(images, sizes), "image_sizes": sizes}

    def _postprocess(self, outputs: dict[str, Any], target_sizes: Tensor) -> list[dict[str, Any]]:
        if "logits" in outputs:  # of --raw
            names = {"pred_logits": outputs["logits"], "pred_boxes": outputs["boxes"]}
            return PostProcess()({**outputs, **names}, target_sizes)
        # from pixels of the resized image to those of the image that was given
        scale = (target_sizes / outputs["image_sizes"]).flip(1).repeat(1, 2)
        found = {**outputs, "boxes": outputs["boxes"] * scale[:, None]}
        images = []
        for i, target_size in enumerate(target_sizes):
            image = {name: found[name][i] for name in ("scores", "labels", "boxes", "queries")}
            if "masks" in found:
                # every mask is a product with itself alone
                one_each = torch.eye(len(image["scores"]))
                image["masks"] = ImageMasks(
                    one_each, found["masks"][i], outputs["image_sizes"][i], target_size
                )
            images.append(image)
        return images


def load_exported(
    source: str,
    *,
    runtime: str = "",
    device: str = "",
    amp: str = "off",
    weights: str = "auto",
    batchformer: bool = False,
    flags: dict[str, Any] | None = None,
    **options: Any,
) -> ExportedDetector:
    """The detector in a file of tools/export.py.

    Args:
        source: the path.
        runtime, device: as for `open_exported`.
        amp, weights, batchformer: must be their defaults, because the export has decided.
        flags: of evaluation, such as eval_size; they go before those of the file.
        options: of Detector.

    Raises:
        UserError: as `open_exported`; the file has decided what an option says.
    """
    if amp != "off" or weights != "auto" or batchformer:
        raise UserError(
            f"--resume {source} was exported: its precision and weights can't be chosen, and it has no "
            "BatchFormerV2; use the checkpoint"
        )
    given = flags or {}
    if more := given.keys() - {*flags_of("evaluation")}:
        raise UserError(f"--resume {source} was exported: --{min(more)} can't be given; use the checkpoint")
    file = open_exported(source, runtime, device)
    try:
        classes = ClassMap.from_plain(file.about["classes"])
        every = {**file.about["flags"], **given}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{source} was not written by tools/export.py: it does not name its classes"
        ) from None
    config = as_given(every, resume=os.fspath(source), eval=True)
    return ExportedDetector(file, config, classes, **options)
