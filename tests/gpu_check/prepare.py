"""Says what machine this is, and builds the kernels that are missing.

    python -m tests.gpu_check.prepare [--device cpu]

Kernels that were built elsewhere are kept if they compute correctly here.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

PROBE = (
    "import sys, torch; from models.ops import backends; backends.choose('compiled', "
    "torch.device(sys.argv[1]))"
)
SOURCE = Path(__file__).resolve().parent / "plain.cu"
PLAIN = SOURCE.with_suffix(".so")  # kernels to compare ours with


def device_parser(description: str | None, program: str | None = None) -> argparse.ArgumentParser:
    """A parser with --device, as the programs of this folder share it."""
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: small sizes (cuda)")
    return parser


def main() -> int:
    device = device_parser(__doc__).parse_args().device
    describe(device)

    # Build only what is missing: it takes minutes.
    ready = kernels_fit(device)
    print(f"kernels: {'were there' if ready else 'to be built'}", flush=True)
    if not ready:
        build_kernels(device)
        ready = kernels_fit(device)
    if device == "cuda" and not PLAIN.exists():
        ready = build_plain() and ready
    return 0 if ready else 1


def describe(device: str) -> None:
    name = f"cpu, {torch.get_num_threads()} threads"
    if device == "cuda":
        subprocess.run(["nvidia-smi"], check=False)
        name = torch.cuda.get_device_name()
    print(f"device: {name}")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"software: {versions}", flush=True)


def kernels_fit(device: str) -> bool:
    """True if the compiled kernels agree with the reference; in a new process, which loads a new build."""
    return subprocess.run([sys.executable, "-c", PROBE, device], check=False).returncode == 0


def build_kernels(device: str) -> None:
    """As models/ops/make.sh, but with this Python: the machine may have no `python` on PATH."""
    # in place, where models.ops looks for the libraries
    command = [sys.executable, "models/ops/setup.py", "-q", "build_ext", "--inplace"]
    devices = "cpu" if device == "cpu" else "cpu cuda"
    subprocess.run(command, env={**os.environ, "MS_DEFORM_ATTN_DEVICES": devices}, check=False)


def build_plain() -> bool:
    """Compile plain.cu for this GPU; False if that fails."""
    from torch.utils.cpp_extension import include_paths, library_paths  # needs setuptools

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("plain.cu can't be compiled: there is no nvcc on PATH or in CUDA_HOME")
        return False

    # one call of the compiler: no build system is needed for one file
    command = f"{nvcc} -std=c++20 -O3 -arch=native -shared -Xcompiler -fPIC -DUSE_CUDA".split()
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # PyTorch 2.10, as in models/ops/setup.py
    for folder in include_paths():
        command += ["-isystem", folder]
    command += [str(SOURCE), "-o", str(PLAIN)]
    for folder in library_paths():
        command += [f"-L{folder}"]
    command += ["-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
