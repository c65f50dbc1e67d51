"""Says what machine this is, and builds what it lacks: python -m tools.gpu_check.prepare [--device cpu].

Kernels that were built elsewhere are kept if they compute right here.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys

import torch

from tools.gpu_check.build import PLAIN, build_kernels, build_plain

# in a process of its own: a library is loaded once
PROBE = "import sys, torch; from models.ops import backends; backends.choose('compiled', torch.device(sys.argv[1]))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    describe(device)
    ready = kernels_fit(device)
    print(f"kernels: {'were there' if ready else 'to be built'}", flush=True)
    if not ready:
        build_kernels("cpu" if device == "cpu" else "cpu cuda")
        ready = kernels_fit(device)
    if device == "cuda" and not PLAIN.exists():
        ready = build_plain("native") and ready
    return 0 if ready else 1


def describe(device: str) -> None:
    if device == "cuda":
        subprocess.run(["nvidia-smi"], check=False)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {name}")
    print(f"software: Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)


def kernels_fit(device: str) -> bool:
    return subprocess.run([sys.executable, "-c", PROBE, device], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
