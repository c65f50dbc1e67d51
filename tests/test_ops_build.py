"""Building the kernels: what make.sh says, what a wheel holds, sanitizers, and the CUDA compiler's
warnings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.ops import compiled
from tests.helpers import ROOT, run

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
CUDA = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def copy(tmp_path):
    """The operator's folder somewhere else, without anything built."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "__init__.py", tmp_path / "models")
    ignored = shutil.ignore_patterns("build", "*.so", "_*.json", "__pycache__", "*.egg-info", "dist")
    return Path(shutil.copytree(compiled.FOLDER, tmp_path / "models" / "ops", ignore=ignored))


@pytest.fixture
def sanitizer():
    """The environment in which Python can load a library that was built with the address sanitizer."""
    found = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # the second for the exceptions that PyTorch throws
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("this compiler has no address sanitizer")
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def make(folder: Path, **env: str) -> subprocess.CompletedProcess:
    return run("sh", "./make.sh", cwd=folder, env=env, timeout=1200)


@needs_compiler
def test_the_documented_commands_word_for_word(copy, tmp_path):
    """Only -O0 is added, as the compiler takes half the time for it."""
    command = "cd ./models/ops && sh ./make.sh && python test.py"
    result = run("bash", "-c", command, cwd=tmp_path, env={"MS_DEFORM_ATTN_CFLAGS": "-O0"})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("built the cpu kernels: ") for line in lines)
    checks = [line for line in lines if line.startswith("* ")]
    assert all(line.startswith("* True check_") for line in checks)
    published = [
        "check_forward_equal_with_pytorch_double: max_abs_err",
        "check_forward_equal_with_pytorch_float: max_abs_err",
        *(f"check_gradient_numerical(D={channels})" for channels in (30, 32, 64, 71, 1025, 2048, 3096)),
    ]
    for backend in ("compiled", "reference"):
        of_it = [line for line in checks if line.endswith(f"(cpu, {backend})")]
        assert all(wanted in line for wanted, line in zip(published, of_it, strict=True))


def test_without_a_compiler_it_says_what_is_missing(copy):
    done = make(copy, CXX="no-such-compiler", MS_DEFORM_ATTN_DEVICES="cpu")
    assert done.returncode == 1
    assert "the cpu kernels could not be built:" in done.stderr
    assert "missing: a C++ compiler, called no-such-compiler" in done.stderr
    assert "Everything works without them, slower." in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(copy.glob("*.so"))
    assert not list(copy.glob("_*.json"))
    tested = run("python", "test.py", cwd=copy)
    assert tested.returncode == 0, tested.stderr
    assert "(cpu, reference)" in tested.stdout
    assert "False" not in tested.stdout


def test_without_a_toolkit_it_says_what_is_missing(copy, tmp_path):
    """Only what make.sh calls is on PATH."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("sh", "mkdir", "grep", "head", "tail", "dirname", "cat"):
        (bin / name).symlink_to(shutil.which(name))
    (bin / "python").symlink_to(sys.executable)
    env = {**os.environ, "PATH": str(bin), "VIRTUAL_ENV": sys.prefix, "MS_DEFORM_ATTN_DEVICES": "cuda"}
    env = {name: value for name, value in env.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    # a symbolic link leaves the virtual environment behind
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    done = subprocess.run(
        ["sh", "./make.sh"], cwd=copy, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "missing: nvcc on PATH, or CUDA_HOME set to a CUDA toolkit" in done.stderr
    assert "Everything works without them, slower." in done.stderr


def test_a_broken_build_shows_the_errors(copy):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    (copy / "csrc" / "cpu" / "kernels.h").write_text("#error this is broken\n")
    done = make(copy, MS_DEFORM_ATTN_DEVICES="cpu")
    assert done.returncode == 1
    assert "#error this is broken" in done.stderr
    assert "build/cpu.log" in done.stderr


@pytest.mark.slow
@needs_compiler
def test_a_wheel_can_be_made_and_used(copy, tmp_path):
    env = {"MS_DEFORM_ATTN_DEVICES": "cpu", "MS_DEFORM_ATTN_CFLAGS": "-O0"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [
        *pip,
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(tmp_path / "dist"),
        str(copy),
    ]
    done = run(*wheel, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"ms_deform_attn-[\d.]+-py3-none-\w+\.whl", made.name)
    target = tmp_path / "site"
    done = run(
        *pip, "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(made), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = """if True:
        import torch
        from ms_deform_attn.functions import ms_deform_attn
        args = torch.randn(1, 6, 2, 8), [(2, 3)], torch.rand(1, 4, 2, 1, 3, 2), torch.rand(1, 4, 2, 1, 3)
        out = ms_deform_attn(*args, backend="compiled")
        torch.testing.assert_close(out, ms_deform_attn(*args, backend="reference"))
    """
    done = run("python", "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr
    assert_only_stable_symbols(target / "ms_deform_attn" / "_cpu.so")


def assert_only_stable_symbols(library: Path) -> None:
    """What it takes from PyTorch is the C interface, and from Python nothing."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    needed = run("nm", "-D", "--undefined-only", str(library)).stdout.split()
    names = [name for name in needed if name not in ("U", "w")]
    foreign = [name for name in names if re.match(r"_?Py|_ZNK?(2at|3c10|5torch)", name)]
    assert not foreign, foreign
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)


@pytest.mark.slow
@needs_compiler
def test_sanitizers_find_nothing_in_the_cpu_kernels(copy, tmp_path, sanitizer):
    """The property test again, with every access to memory and every conversion checked.

    -O1, as the sanitizers' manual has it: they see every access before it is optimised, and -O3
    takes four times as long.
    """
    flags = (
        "-O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all "
        "-fno-omit-frame-pointer"
    )
    done = make(copy, MS_DEFORM_ATTN_CFLAGS=flags, MS_DEFORM_ATTN_DEVICES="cpu")
    assert done.returncode == 0, done.stderr
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "helpers.py", "processes.py", "test_ops_property.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    env = {**sanitizer, "PYTHONPATH": str(tmp_path)}
    chosen = "(compiled or finite or conversions) and not gpu"
    pytest_here = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "tests")
    done = run(*pytest_here, cwd=tmp_path, env=env, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_compiler
def test_sanitizers_would_find_something(copy, tmp_path, sanitizer):
    """A planted mistake, so that the test above can fail."""
    source = copy / "csrc" / "cpu" / "kernels_impl.h"
    text = source.read_text()
    planted = text.replace("lower + across.second_index", "lower + across.second_index + 9")
    assert planted != text
    source.write_text(planted)
    done = make(copy, MS_DEFORM_ATTN_CFLAGS="-O0 -fsanitize=address", MS_DEFORM_ATTN_DEVICES="cpu")
    assert done.returncode == 0, done.stderr
    code = """if True:
        import torch
        from models.ops import compiled
        assert compiled.missing("cpu") is None
        value, locations = torch.randn(1, 6, 1, 32), torch.full((1, 1, 1, 1, 1, 2), 0.9)
        compiled.forward(value, [(2, 3)], locations, torch.ones(1, 1, 1, 1, 1))
    """
    env = {**sanitizer, "PYTHONPATH": str(tmp_path)}
    done = run("python", "-c", code, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CUDA is None, reason="needs a CUDA toolkit")
def test_the_cuda_source_compiles_without_warnings_and_spills(copy):
    """Of our files, a planted one aside: it shows that warnings arrive here. PyTorch's headers have
    their own. A kernel that keeps registers in memory, which ptxas reports, would be slow.
    """
    planted = copy / "csrc" / "cuda" / "planted.cu"
    planted.write_text("void planted() { int unused; }\n")
    warnings = "-Wall -Wextra"
    done = make(
        copy,
        FORCE_CUDA="1",
        TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX",
        MS_DEFORM_ATTN_DEVICES="cuda",
        MS_DEFORM_ATTN_NVCC_FLAGS=f"-Xcompiler={','.join(warnings.split())} -Xptxas=-v",
    )
    log = (copy / "build" / "cuda.log").read_text()
    if "mismatches the version that was used to compile" in log:
        pytest.skip("PyTorch was built for another CUDA than the toolkit's")
    assert done.returncode == 0, log[-4000:]
    warned = {(copy / name).resolve() for name in re.findall(r"^(\S+?)[:(]\d+.*warning", log, re.MULTILINE)}
    assert {path for path in warned if path.is_relative_to(copy.resolve())} == {planted.resolve()}, log[
        -4000:
    ]
    spills = [int(stored) for stored in re.findall(r"(\d+) bytes spill stores", log)]
    # both architectures report every kernel
    assert len(spills) == log.count("Compiling entry function") > 100
    assert not any(spills), log
    record = json.loads((copy / "_cuda.json").read_text())
    assert record["architectures"] == "8.0;9.0+PTX"
    assert_only_stable_symbols(copy / "_cuda.so")
    if listing := shutil.which("cuobjdump", path=f"{record['toolkit']}/bin"):
        held = run(listing, "--list-elf", "--list-ptx", str(copy / "_cuda.so")).stdout
        for architecture in ("sm_80", "sm_90", "ptx"):
            assert architecture in held, held
        count = [sys.executable, str(ROOT / "tools/dev/count_instructions.py"), str(copy / "_cuda.so")]
        counted = run(*count, env={"PATH": f"{record['toolkit']}/bin:{os.environ['PATH']}"})
        # docs/ops.md has the numbers of nvcc 13.0
        assert (
            700
            < int(re.search(r"(\d+) a warp.*published_forward_kernel<float, Raw", counted.stdout)[1])
            < 1200
        )
