"""A detector as a file: .onnx, or .pt2 of torch.export, with what its users must know in it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.export import ExportedProgram

from models.detector import Detector
from models.export.graph import INPUTS, DetectorGraph, trace
from models.export.runtime import ABOUT
from util.atomic import written_aside
from util.checkpoint import ONNX, PT2
from util.config import FLAGS
from util.errors import UserError

# by the --amp that computes the same
PRECISIONS = {"off": "float32", "fp16": "float16", "bf16": "bfloat16"}
OPSET = 18
OPSETS = range(18, 24)  # what is written of them passed the checker
BFLOAT16_OPSET = 22  # in the standard, convolutions take it from here on
PACKAGES = {ONNX: ("onnx", "onnxscript"), PT2: ()}


def check_output(path: Path, opset: int, amp: str) -> None:
    """Raise UserError for what can't be written, before anything takes time."""
    if path.suffix not in PACKAGES:
        raise UserError(f"--output {path} must end with {ONNX} or {PT2}")
    if path.suffix == ONNX and opset not in OPSETS:
        raise UserError(f"--opset {opset} must be from {OPSETS[0]} to {OPSETS[-1]}")
    missing = [name for name in PACKAGES[path.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--output {path} needs more packages: pip install {' '.join(missing)}")
    if path.suffix == ONNX and amp == "bf16" and opset < BFLOAT16_OPSET:
        raise UserError(f"--precision bfloat16 needs --opset {BFLOAT16_OPSET} or later")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: the folder {path.parent} does not exist, or can't be written")


def write(detector: Detector, path: Path, *, amp: str = "off", raw: bool = False, opset: int = OPSET) -> None:
    """Write the file.

    Args:
        detector: of `load_detector`, on the CPU.
        path: ends with .onnx or .pt2; replaced as a whole.
        amp: precision of products, "off", "bf16" or "fp16".
        raw: give logits and boxes of all queries instead of the best detections.
        opset: of ONNX.

    Raises:
        UserError: the file can't be written, or is no valid ONNX.
    """
    graph = DetectorGraph(detector.model, raw, amp)
    about = _about(detector, graph)
    program = trace(graph)
    try:
        with written_aside(path) as aside:
            if path.suffix == ONNX:
                _write_onnx(program, aside, graph, about, opset)
            else:
                # the images that it was traced with, and paths of this project
                program.example_inputs = None
                for node in program.graph.nodes:
                    node.meta.pop("stack_trace", None)
                with open(aside, "wb") as file:
                    torch.export.save(program, file, extra_files={ABOUT: json.dumps(about)})
    except OSError as error:
        raise UserError(f"--output {path} can't be written ({error.strerror or error})") from None


def _write_onnx(
    program: ExportedProgram, path: Path, graph: DetectorGraph, about: dict[str, str], opset: int
) -> None:
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            program,
            input_names=INPUTS,
            output_names=graph.outputs,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    # paths and lines of this project, a tenth of the file's size without weights
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, about)
    _name_dimensions(model)
    check(model)
    onnx.save(model, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_dimensions(model) -> None:
    """Name what the inputs leave open."""
    names = {"images": ("batch", "", "height", "width"), "sizes": ("batch", "")}
    renamed = {}
    for value in model.graph.input:
        for dimension, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=True):
            if name:
                renamed[dimension.dim_param] = name
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in renamed:  # or a fixed length would be lost
                dimension.dim_param = renamed[dimension.dim_param]


def check(model) -> None:
    """Raise UserError unless this ONNX model passes the checker and has the standard's operators alone."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"ONNX's checker refuses what was made: {error}") from None
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain} | {
        function.name for function in model.functions
    }
    foreign |= {node.op_type for node in model.graph.node if node.op_type == "GridSample"}
    if foreign:
        raise UserError(f"what was made has operators that runtimes lack: {', '.join(sorted(foreign))}")


def _about(detector: Detector, graph: DetectorGraph) -> dict[str, str]:
    """What the file says of itself: JSON by key."""
    data, flags, classes = detector.config.data, detector.config.flags(), detector.classes
    known = {name: flags[name] for name, flag in FLAGS.items() if flag.of in ("architecture", "evaluation")}
    about = {
        "resize": {
            "shorter_side": data.eval_size,
            "longest_side": data.max_size,
            "how": "PIL: Image.resize(size, Image.BILINEAR), of an RGB image; the longest side has priority",
        },
        "inputs": {
            "images": "uint8 RGB, padded right and below; not normalised",
            "sizes": "height and width of each image without its padding",
        },
        "outputs": {name: _OUTPUTS[graph.raw, name] for name in graph.outputs},
        # of labels without a category too, which may be detected
        "names": {label: classes.name_of(label) for label in range(classes.num_classes)},
        "classes": classes.to_plain(),
        "flags": known,
        "precision": PRECISIONS[graph.amp],
    }
    return {key: json.dumps(value) for key, value in about.items()}


_OUTPUTS = {
    (False, "scores"): "of the best detections, in [0, 1], best first",
    (False, "labels"): "place among the logits; `names` has their names, `classes` [label, id, name]",
    (False, "boxes"): "x0, y0, x1, y1 in pixels of the resized image",
    (False, "queries"): "which query gave it",
    (False, "masks"): "above 0 is the object; a cell is 4 x 4 pixels of the padded image",
    (True, "logits"): "of every query and class, before the sigmoid",
    (True, "boxes"): "of every query: centre x, centre y, width, height in [0, 1] of the unpadded image",
    (True, "pixel_embed"): "of every 4 x 4 pixels of the padded image",
    (True, "mask_embed"): "of every query; its product with pixel_embed above 0 is the object",
}
