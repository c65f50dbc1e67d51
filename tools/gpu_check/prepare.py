"""Says what machine this is, and builds what it lacks: python -m tools.gpu_check.prepare [--device
cpu].

Kernels that were built elsewhere are kept if they compute right here.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from tools.gpu_check.runner import find_tool

# in a process of its own: a library is loaded once
PROBE = (
    "import sys, torch; from models.ops import backends; backends.choose('compiled', "
    "torch.device(sys.argv[1]))"
)
HERE = Path(__file__).resolve().parent
PLAIN = HERE / "plain.so"  # the kernels that the operator's are compared with


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    describe(device)
    ready = kernels_fit(device)
    print(f"kernels: {'were there' if ready else 'to be built'}", flush=True)
    if not ready:
        build_kernels("cpu" if device == "cpu" else "cpu cuda")
        ready = kernels_fit(device)
    if device == "cuda" and not PLAIN.exists():
        ready = build_plain() and ready
    return 0 if ready else 1


def describe(device: str) -> None:
    if device == "cuda":
        subprocess.run(["nvidia-smi"], check=False)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {name}")
    print(
        f"software: Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        flush=True,
    )


def kernels_fit(device: str) -> bool:
    return subprocess.run([sys.executable, "-c", PROBE, device], check=False).returncode == 0


def build_kernels(devices: str) -> None:
    """As models/ops/make.sh, but with this Python, which the machine may know as python3 only."""
    command = [sys.executable, "models/ops/setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, env={**os.environ, "MS_DEFORM_ATTN_DEVICES": devices}, check=False)


def build_plain() -> bool:
    """Makes plain.so of plain.cu for this GPU; false if that fails."""
    from torch.utils.cpp_extension import include_paths, library_paths  # needs setuptools

    nvcc = find_tool("nvcc")
    if nvcc is None:
        print("plain.cu can't be compiled: there is no nvcc on PATH or in CUDA_HOME")
        return False
    headers = [flag for folder in include_paths() for flag in ("-isystem", folder)]
    flags = ["-std=c++20", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]
    libraries = [
        *(f"-L{folder}" for folder in library_paths()),
        "-Xlinker",
        "--no-as-needed",
        "-ltorch_cpu",
        "-ltorch_cuda",
    ]
    abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10, as in models/ops/setup.py
    command = [nvcc, *flags, abi, *headers, HERE / "plain.cu", "-o", PLAIN, *libraries]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
