"""Builds the kernels: `sh ./make.sh` here for use in place, `pip wheel --no-build-isolation
--no-deps .` for a wheel.

One library for the CPU and one for CUDA, on LibTorch's stable ABI of PyTorch 2.10, with no Python
in them: a build goes on working when PyTorch or Python is upgraded. Read from the environment:

    CUDA_HOME               the toolkit; found through nvcc on PATH otherwise
    FORCE_CUDA=1            build for CUDA although this machine has no GPU;  FORCE_CUDA=0: don't
    TORCH_CUDA_ARCH_LIST    "8.0;9.0+PTX" and the like; this machine's GPU, else DEFAULT_ARCHITECTURES
    MS_DEFORM_ATTN_DEVICES  "cpu", "cuda" or "cpu cuda": build just these
    MS_DEFORM_ATTN_CFLAGS, MS_DEFORM_ATTN_NVCC_FLAGS    further compiler flags (a sanitizer's, for example)
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent
PACKAGE = "ms_deform_attn"  # of a wheel; the modules import each other by relative names
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"
STABLE_ABI = "0x020a000000000000"  # PyTorch 2.10


def find_cuda() -> str | None:
    """The toolkit's folder. nvcc on PATH may be a script that calls the real one, so it is asked
    where it lives.
    """
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    if not (nvcc := shutil.which("nvcc")):
        return None
    # with --dryrun it prints its settings, TOP among them
    said = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    homes = [line.split("=", 1)[1].strip() for line in said.splitlines() if line.startswith("#$ TOP=")]
    return os.path.realpath(homes[0]) if homes else str(Path(nvcc).resolve().parent.parent)


def devices(cuda_home: str | None) -> list[str]:
    if asked := os.environ.get("MS_DEFORM_ATTN_DEVICES"):
        return asked.split()
    # a login node of a cluster builds for the GPUs of others
    forced = os.environ.get("FORCE_CUDA")
    wants_cuda = forced == "1" or (forced != "0" and cuda_home is not None and torch.cuda.is_available())
    return ["cpu", "cuda"] if wants_cuda else ["cpu"]


CUDA_HOME = find_cuda()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # read when torch.utils.cpp_extension is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)

from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402 - after CUDA_HOME


def cpu_extension() -> Extension:
    further = os.environ.get("MS_DEFORM_ATTN_CFLAGS", "").split()
    return Extension(
        f"{PACKAGE}._cpu",
        sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").glob("*.cpp")),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        # with traps and errno the compiler keeps comparisons and roots apart that it could make
        # vectors of
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            *further,
        ],
        extra_link_args=further,
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    if CUDA_HOME is None:
        sys.exit("no CUDA toolkit: there is no nvcc on PATH, and CUDA_HOME is not set")
    if torch.version.cuda is None:
        sys.exit(f"this PyTorch ({torch.__version__}) was built without CUDA")
    further = os.environ.get("MS_DEFORM_ATTN_NVCC_FLAGS", "").split()
    return Extension(
        f"{PACKAGE}._cuda",
        sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cuda").glob("*.cu")),
        include_dirs=[*include_paths(), f"{CUDA_HOME}/include"],
        library_dirs=[*library_paths(), f"{CUDA_HOME}/lib64"],
        # CUDA's runtime inside the library, so that it depends on the driver alone
        libraries=["torch_cpu", "torch_cuda", "cudart_static", "rt", "pthread", "dl"],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("USE_CUDA", None)],
        extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3", "--threads=2", *further]},
        py_limited_api=True,
    )


class Build(BuildExtension):
    """Writes beside every library what it was built from and for.

    models/ops/compiled.py reads that before it loads the library.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def run(self) -> None:
        # a build that fails leaves no record, and the old library is not loaded
        for extension in self.extensions:
            self.record_path(extension).unlink(missing_ok=True)
        super().run()
        for extension in self.extensions:
            device = extension.name.rsplit("_", 1)[-1]
            record: dict[str, Any] = {
                "sources": hash_of_sources(device),
                "torch": torch.__version__,
                "compiler": compiler(),
            }
            if device == "cuda":
                record |= {"toolkit": CUDA_HOME, "architectures": architectures()}
            self.record_path(extension).write_text(json.dumps(record, indent=2) + "\n")

    def record_path(self, extension: Extension) -> Path:
        return Path(self.get_ext_fullpath(extension.name)).with_suffix(".json")


class Wheel(bdist_wheel):
    """The libraries hold no Python, so a wheel fits any Python 3 on this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def hash_of_sources(device: str) -> str:
    """That of models/ops/compiled.py, run by its path: its package may not be importable here."""
    return runpy.run_path(str(HERE / "compiled.py"))["hash_of_sources"](device)


def compiler() -> str:
    said = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    return said.splitlines()[0] if said else "unknown"


def architectures() -> str:
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return named
    # what torch.utils.cpp_extension then builds for
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities)) + "+PTX"


if __name__ == "__main__":
    os.chdir(HERE)
    build = {"cpu": cpu_extension, "cuda": cuda_extension}
    setup(
        name=PACKAGE,
        version="1.0",
        description="Multi-scale deformable attention on the stable ABI of PyTorch 2.10, "
        f"built on {platform.system()}",
        packages=[PACKAGE],
        package_dir={PACKAGE: "."},
        package_data={PACKAGE: ["*.json"]},
        python_requires=">=3.10",
        install_requires=["torch>=2.10"],
        ext_modules=[build[device]() for device in devices(CUDA_HOME)],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    )
