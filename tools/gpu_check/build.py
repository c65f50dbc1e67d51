"""Builds what the check runs: the operator's kernels, and the plain kernels that they are compared with."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.gpu_check.runner import find_tool

HERE = Path(__file__).resolve().parent
PLAIN = HERE / "plain.so"


def build_kernels(devices: str, **environment: str) -> bool:
    """Runs models/ops/make.sh for "cpu", "cuda" or both with this Python; false if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        # make.sh calls `python`, which a machine may know as python3 only; a link would lose a virtual environment
        python = Path(folder) / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        own = {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, "MS_DEFORM_ATTN_DEVICES": devices}
        done = subprocess.run(["sh", "models/ops/make.sh"], env={**os.environ, **own, **environment}, check=False)
    return done.returncode == 0


def build_plain(architecture: str) -> bool:
    """Makes plain.so of plain.cu for "native" or "sm_90"; false if that fails."""
    from torch.utils.cpp_extension import include_paths  # needs setuptools

    nvcc = find_tool("nvcc")
    if nvcc is None:
        print("plain.cu can't be compiled: there is no nvcc on PATH or in CUDA_HOME")
        return False
    headers = [flag for folder in include_paths() for flag in ("-isystem", folder)]
    flags = ["-std=c++20", "-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]
    abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # PyTorch 2.10, as in models/ops/setup.py
    return subprocess.run([nvcc, *flags, abi, *headers, HERE / "plain.cu", "-o", PLAIN], check=False).returncode == 0
