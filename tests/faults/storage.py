"""A disk that fills up, turns read-only, or fails to rename, in the middle of real runs: no good
checkpoint is ever lost.

    sudo python -m tests.faults.storage

Mounts file systems of its own (tmpfs), in a mount namespace that nobody else sees. Each run must
end with exit code 74 and leave every checkpoint that it had intact; when the fault is mended,
--resume auto must end as the run that was never disturbed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.faults.compare import differences
from tests.helpers import ROOT, SMALL_IMAGES, SMALL_MODEL, environment, write_coco
from util.checkpoint import read_checkpoint
from util.errors import EXIT_NOT_SAVED, NotSavedError
from util.run.checkpoints import CheckpointFolder
from util.run.state import TrainingPosition

RENAME = """#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* fails for checkpoints while the file that RENAME_FAILS names is there */
static int fails(const char *to) {
  const char *flag = getenv("RENAME_FAILS");
  if (!flag || access(flag, F_OK) || !strstr(to, ".pth")) return 0;
  errno = EIO;
  return 1;
}
int rename(const char *from, const char *to) {
  int (*next)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
  return fails(to) ? -1 : next(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  int (*next)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");
  return fails(to) ? -1 : next(a, from, b, to);
}
"""


def main() -> int:
    if os.geteuid() != 0:
        print("needs root: it mounts file systems", file=sys.stderr)
        return 2
    if "IN_NAMESPACE" not in os.environ:
        command = ["unshare", "--mount", sys.executable, "-m", "tests.faults.storage"]
        return subprocess.run(command, env=environment(IN_NAMESPACE="1"), check=False).returncode
    # the mounts end with the namespace
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        work = Path(name)
        write_coco(work / "data", num_train=8, num_val=2)
        sound = mount(work / "sound", "2g")
        assert run(work, sound)[0] == 0
        size = (sound / "checkpoint.pth").stat().st_size
        results = [
            few_megabytes(work),
            *[fault(work, sound, size) for fault in (fills_up, read_only, cannot_rename)],
        ]
    for text in results:
        print(text)
    return 0


def run(
    work: Path, folder: Path, at: str = "", fault: Callable[[], None] | None = None, **variables: str
) -> tuple[int, str]:
    """A run of 8 saves into `folder`; `fault` strikes when the pattern `at` is printed. Gives exit
    code and output.
    """
    command = [
        sys.executable,
        "-u",
        "main.py",
        "--coco_path",
        str(work / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--output_dir",
        str(folder),
        "--epochs",
        "2",
        "--log_every",
        "1",
        "--save_every",
        "1",
        "--keep",
        "2",
        "--resume",
        "auto",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    for line in process.stdout or ():
        output.append(line)
        if fault and re.search(at, line):
            fault()
            fault = None
    return process.wait(), "".join(output)


def few_megabytes(work: Path) -> str:
    """The folder of checkpoints by itself, on 4 MB: as many saves as fit, then each failure leaves
    the others.
    """
    folder = mount(work / "few", "4m")
    checkpoints = CheckpointFolder(folder, keep=3)
    patch_waits()
    saved = 0
    try:
        for i in range(10):
            noise = torch.full((300_000,), float(i))
            saved += checkpoints.save({"model": {"noise": noise}}, TrainingPosition(0, i)) is not None
    except NotSavedError as error:
        assert "no space left" in str(error).lower(), error
        good = [path for path in folder.glob("resume_*.pth") if read_checkpoint(path)]
        assert len(good) == saved == 3, (good, saved)
        assert not list(folder.glob(".*")), "nothing half-written is left"
        return (
            f"a disk of 4 MB: {saved} checkpoints of 1.2 MB written, then refused three times, all "
            f"{len(good)} intact: passed"
        )
    raise AssertionError("the disk did not fill up")


def fills_up(work: Path, sound: Path, size: int) -> str:
    folder = mount(work / "full", f"{int(2.5 * size)}")
    code, output = run(work, folder)
    found = checked("a disk that fills up", folder, code, output)
    return found + finished(work, sound, folder, lambda: remount(folder, "size=2g"))


def read_only(work: Path, sound: Path, size: int) -> str:
    folder = mount(work / "readonly", "2g")
    # the second step's line comes before its save
    code, output = run(work, folder, r"epoch 0 \S+ \[3/", lambda: remount(folder, "ro"))
    found = checked("a disk that turns read-only", folder, code, output)
    return found + finished(work, sound, folder, lambda: remount(folder, "rw"))


def cannot_rename(work: Path, sound: Path, size: int) -> str:
    folder = mount(work / "rename", "2g")
    source, library, flag = work / "rename.c", work / "rename.so", work / "fails"
    source.write_text(RENAME)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    code, output = run(
        work, folder, r"epoch 0 \S+ \[3/", flag.touch, LD_PRELOAD=str(library), RENAME_FAILS=str(flag)
    )
    return checked("a disk where renaming fails", folder, code, output) + finished(
        work, sound, folder, flag.unlink
    )


def checked(what: str, folder: Path, code: int, output: str) -> str:
    assert code == EXIT_NOT_SAVED, (what, code, output)
    assert "Traceback" not in output, output
    assert "terminate called" not in output, output
    good = [path.name for path in sorted(folder.glob("resume_*.pth")) if read_checkpoint(path)]
    assert len(good) == 2, (what, good)
    return (
        f"{what}: exit code {code}, {output.count('trying again')} writes tried again, "
        f"{len(good)} checkpoints intact"
    )


def finished(work: Path, sound: Path, folder: Path, mend: Callable[[], None]) -> str:
    mend()
    code, output = run(work, folder)
    assert code == 0, output
    assert differences(sound, folder) == []
    return "; mended and resumed: identical to the undisturbed run: passed"


def mount(folder: Path, size: str) -> Path:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    return folder


def remount(folder: Path, option: str) -> None:
    for _ in range(1000):  # read-only has to wait until no file is being written
        if (
            subprocess.run(
                ["mount", "-o", f"remount,{option}", str(folder)], capture_output=True, check=False
            ).returncode
            == 0
        ):
            return
        time.sleep(0.01)
    raise AssertionError(f"{folder} could not be remounted")


def patch_waits() -> None:
    import util.run.checkpoints

    util.run.checkpoints.WAITS = (0.01,)


if __name__ == "__main__":
    sys.exit(main())
