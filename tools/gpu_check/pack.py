"""Makes one archive of what a GPU machine without a network needs: sources, built kernels, packages, a small data set."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from models.ops import compiled
from tools.gpu_check.build import PLAIN, build_kernels, build_plain
from tools.gpu_check.runner import CARRIED, commit
from tools.gpu_check.steps import DATA
from util.errors import UserError

# what the steps take beside torch, torchvision and what comes with them
PACKAGES = ("pycocotools", "scipy", "tqdm", "safetensors")
FOLDER = "gpu_check"  # in the archive
HOPPER = "9.0+PTX"


def pack(archive: Path, python: str, packages: Sequence[str] = PACKAGES) -> None:
    """Write the archive, for that version of Python. Raises UserError for what can't be made here."""
    files = [*sources(), *build()]
    with tempfile.TemporaryDirectory() as folder:
        carried = Path(folder)
        (carried / "commit").write_text(commit())
        for package in packages:
            fetch(package, python, carried / "site" / package)
        make_data(carried / "data")
        with tarfile.open(archive, "w:gz") as target:
            for path in files:
                target.add(path, f"{FOLDER}/{path}")
            target.add(carried, f"{FOLDER}/{CARRIED.relative_to(Path.cwd())}")
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def sources() -> list[str]:
    said = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=False)
    if said.returncode:
        raise UserError("--pack: git can't list the sources here; run this in a clone of the project")
    return said.stdout.strip("\0").split("\0")


def build() -> list[str]:
    """The paths of the built kernels; what is missing is built for an H100."""
    missing = " ".join(device for device in ("cpu", "cuda") if compiled.missing(device))
    if missing and not build_kernels(missing, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=HOPPER):
        raise UserError("--pack: the kernels can't be built here, see above; it takes a C++ compiler and a CUDA toolkit")
    if not build_plain("sm_90"):
        raise UserError("--pack: tools/gpu_check/plain.cu can't be compiled here, see above")
    built = [PLAIN, *(compiled.FOLDER / f"_{device}{end}" for device in ("cpu", "cuda") for end in (".so", ".json"))]
    return [str(path.relative_to(Path.cwd())) for path in built]


def fetch(package: str, python: str, target: Path) -> None:
    """A package's newest wheel for Linux and that Python, unpacked."""
    platforms = [f"--platform=manylinux{form}_{platform.machine()}" for form in ("2014", "_2_17", "_2_27", "_2_28")]
    wanted = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *wanted, "--dest", folder, package]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"--pack: {package} can't be downloaded for Python {python}, see above")
        shutil.unpack_archive(next(Path(folder).glob("*.whl")), target, "zip")


def make_data(folder: Path) -> None:
    command = ["-m", "datasets.synthetic", "--output_dir", str(folder), *DATA.split()]
    subprocess.run([sys.executable, *command], check=True)
