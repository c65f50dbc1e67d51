"""Exported files, and what runs them: ONNX Runtime, OpenVINO, PyTorch."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from util.checkpoint import ONNX, PT2
from util.errors import UserError

ABOUT = "about.json"  # in a .pt2
# images [B, 3, H, W] uint8 and sizes [B, 2] int64 on the CPU to outputs on the CPU, by name
Run = Callable[[Tensor, Tensor], dict[str, Tensor]]


class ExportedFile(NamedTuple):
    """run: a runtime with the file; about: what the file says of itself, by key."""

    run: Run
    about: dict[str, Any]


def open_exported(path: str | os.PathLike, runtime: str = "", device: str = "") -> ExportedFile:
    """Open a file of tools/export.py.

    Args:
        runtime: of RUNTIMES; by default the first that reads this kind of file.
        device: "cpu" or "cuda"; by default the CPU.

    Raises:
        UserError: the file can't be read or is not of tools/export.py; the runtime is not installed,
            does not read it, or has no such device.
    """
    file, name = Path(path), runtime_of(path, runtime)
    if not file.is_file():
        raise UserError(f"{path} is no file; tools/export.py writes such files")
    if device not in ("", "cpu", "cuda"):
        raise UserError(f"--device {device} can't be used with {file}; use cpu or cuda")
    _, package, opener = RUNTIMES[name]
    module = importlib.import_module(package)
    try:
        run, texts = opener(module, str(file), device or "cpu")
    except UserError:
        raise
    except Exception as error:  # each runtime has its own
        raise UserError(f"{name} can't open {file}: {_first_line(error)}") from None
    try:
        about = {key: json.loads(text) for key, text in texts.items()}
    except ValueError:
        raise UserError(f"{file} was not written by tools/export.py: it does not say how to use it") from None

    def run_file(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        try:
            return run(images, sizes)
        except Exception as error:
            height, width = images.shape[2:]
            what = f"{name} can't run {file} on images of {height} x {width} pixels: {_first_line(error)}"
            raise UserError(f"{what}; if they are too small, raise --eval_size and --max_size") from None

    return ExportedFile(run_file, about)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def runtime_of(path: str | os.PathLike, runtime: str = "") -> str:
    """The key of RUNTIMES for a file: `runtime`, or the first that reads such files.

    Raises UserError if it is not installed, or does not read them.
    """
    able = [name for name, (suffix, _, _) in RUNTIMES.items() if suffix == Path(path).suffix]
    name = runtime or able[0]
    if name not in able:
        raise UserError(f"--runtime {name} does not run {path}; use {' or '.join(able)}")
    if importlib.util.find_spec(RUNTIMES[name][1]) is None:
        raise UserError(f"{path} needs one more package to run: pip install {RUNTIMES[name][1]}")
    return name


def _open_in_onnx_runtime(onnxruntime: Any, path: str, device: str) -> tuple[Run, Mapping[str, str]]:
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"--device {device}: this onnxruntime has no {provider}; install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:  # it has only said so in a warning
        raise UserError(f"--device {device}: onnxruntime can't use {provider} here; use --device cpu")
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        found = session.run(names, {"images": images.numpy(), "sizes": sizes.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

    return run, session.get_modelmeta().custom_metadata_map


def _open_in_openvino(openvino: Any, path: str, device: str) -> tuple[Run, Mapping[str, str]]:
    import onnx

    # its default precision may be lower than the file's
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, {"cpu": "CPU", "cuda": "GPU"}[device], hints)
    names = [output.get_any_name() for output in compiled.outputs]

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        found = compiled({"images": images.numpy(), "sizes": sizes.numpy()})
        return {name: torch.from_numpy(found[name].copy()) for name in names}

    properties = onnx.load(path, load_external_data=False).metadata_props
    return run, {entry.key: entry.value for entry in properties}


def _open_in_torch(_: Any, path: str, device: str) -> tuple[Run, Mapping[str, str]]:
    from torch.export.passes import move_to_device_pass  # slow, and only a .pt2 needs it

    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged or no .pt2 file; write it again with tools/export.py")
    extra = {ABOUT: ""}
    program = torch.export.load(path, extra_files=extra)
    if device != "cpu":
        program = move_to_device_pass(program, device)
    if not extra[ABOUT]:
        raise UserError(f"{path} was not written by tools/export.py: it does not say how to use it")
    module, about = program.module(), json.loads(extra[ABOUT])
    names = list(json.loads(about["outputs"]))

    @torch.no_grad()
    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        found = module(images.to(device), sizes.to(device))
        return {name: values.cpu() for name, values in zip(names, found, strict=True)}

    return run, about


# --runtime -> the kind of file, the package, and what opens the file
RUNTIMES = {
    "onnxruntime": (ONNX, "onnxruntime", _open_in_onnx_runtime),
    "openvino": (ONNX, "openvino", _open_in_openvino),
    "torch": (PT2, "torch", _open_in_torch),
}
