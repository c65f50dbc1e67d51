"""The checkpoints of a run's folder: which are kept, which is found, what a bad disk and a damaged
file mean.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import util.run.checkpoints
from engine import Evaluation
from tests.faults.compare import differing
from tests.helpers import SMALL_IMAGES, SMALL_MODEL, run, write_coco
from tests.processes import run_main_forked
from util import checkpoint
from util.checkpoint import check_intact, read_checkpoint, write_atomically
from util.config import parse_config
from util.errors import NotSavedError, UserError
from util.run.checkpoints import CheckpointFolder
from util.run.console import EpochSummary
from util.run.folder import RunFolder
from util.run.history import History
from util.run.state import TrainingPosition


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(util.run.checkpoints, "WAITS", (0.0, 0.0))


def content(number: int) -> dict:
    return {"model": {"number": torch.tensor(number)}}


def number_in(path) -> int:
    return read_checkpoint(path)["model"]["number"].item()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is kept


def test_the_last_few_are_kept_and_those_of_the_schedule_always(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in range(1, 6):
        folder.save(content(epoch), TrainingPosition(epoch, 0), ["checkpoint0001.pth"] if epoch == 2 else [])
    folder.name_newest("checkpoint_best.pth")
    folder.save(content(6), TrainingPosition(5, 40))
    rolling = ["resume_0005_000000000.pth", "resume_0005_000000040.pth"]
    assert names(tmp_path) == ["checkpoint.pth", "checkpoint0001.pth", "checkpoint_best.pth", *rolling]
    assert number_in(tmp_path / "checkpoint.pth") == 6
    assert number_in(tmp_path / "checkpoint0001.pth") == 2
    assert number_in(tmp_path / "checkpoint_best.pth") == 5
    path, newest = CheckpointFolder(tmp_path, 2).newest_good()
    assert path == tmp_path / rolling[1]
    assert newest == content(6)


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    CheckpointFolder(tmp_path, 2).save(content(1), TrainingPosition(1, 0), ["checkpoint0000.pth"])
    assert [number_in(path) for path in tmp_path.glob("*.pth")] == [1, 1, 1]


# ---- damage


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "the end", "a page of zeros"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage):
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in (1, 2):
        folder.save(content(epoch) | {"filler": torch.zeros(5000)}, TrainingPosition(epoch, 0))
    newest = tmp_path / "resume_0002_000000000.pth"
    data = bytearray(newest.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = b""
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
    elif damage == "the end":
        data[-20:] = bytes(20)
    else:
        data[4096:8192] = bytes([1]) * 4096
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        path, _ = CheckpointFolder(tmp_path, 3).newest_good()
    assert path.name == "resume_0001_000000000.pth"
    assert "resume_0002_000000000.pth is damaged" in caplog.text
    assert "the one before it is taken" in caplog.text


def test_every_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    path, changed = tmp_path / "a.pth", tmp_path / "b.pth"
    write_atomically(content(7), path)
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        mutant = bytearray(data)
        mutant[position] ^= 1 << (position % 8)
        changed.write_bytes(mutant)
        try:
            assert number_in(changed) == 7
            assert position >= len(data) - 80, (
                "only the seal's own name: the zip file's sums then tell that all is well"
            )
        except UserError as error:
            assert "is damaged" in str(error)


def test_checkpoints_of_others_are_checked_by_their_own_sums(tmp_path):
    torch.save({"model": {"a": torch.arange(4000)}}, tmp_path / "published.pth")
    check_intact(tmp_path / "published.pth")
    data = bytearray((tmp_path / "published.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "published.pth").write_bytes(data)
    assert torch.load(tmp_path / "published.pth") is not None, "PyTorch does not notice"
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(tmp_path / "published.pth")


def in_directory(data: bytes, name: str) -> int:
    """Where the directory of a zip file has the entry of a record."""
    # the directory comes last, and an entry's name after 46 bytes
    return data.rindex(name.encode()) - 46


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def save_without_a_seal(content: dict, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)


def marked_as_a_folder(data: bytes, other: bytes) -> bytes:
    at = in_directory(data, "archive/data/2") + 38
    return replaced(data, at, bytes([data[at] ^ 0x10]))


def two_names_exchanged(data: bytes, other: bytes) -> bytes:
    return data.replace(b"data/0", b"data/x").replace(b"data/1", b"data/0").replace(b"data/x", b"data/1")


def a_record_of_another_checkpoint(data: bytes, other: bytes) -> bytes:
    start, end = (data.index(name) - 30 for name in (b"archive/data/0", b"archive/data/1"))
    entry = in_directory(data, "archive/data/0")
    return replaced(replaced(data, start, other[start:end]), entry, other[entry : entry + 60])


@pytest.mark.parametrize(
    ("damage", "noticed_without"),
    [
        (marked_as_a_folder, True),
        (two_names_exchanged, False),
        (a_record_of_another_checkpoint, False),
    ],
)
def test_what_the_checksums_of_a_zip_file_miss(tmp_path, damage: Callable, noticed_without: bool):
    """The SHA-256 notices all. Without it, records that are marked as folders are looked for."""
    shapes = {"a": 1000, "b": 1000, "c": 10_000_000}  # c: too large for memory that was used before
    first, second = ({"model": {k: torch.full((n,), v) for k, n in shapes.items()}} for v in (1.0, 2.0))
    first["model"]["b"] += 10
    for name, write in (("sealed.pth", write_atomically), ("unsealed.pth", save_without_a_seal)):
        path = tmp_path / name
        write(second, path)
        other = path.read_bytes()
        write(first, path)
        path.write_bytes(damage(path.read_bytes(), other))
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, "every checksum of the zip file fits"
        assert list(differing("", first, torch.load(path))), "PyTorch reads other numbers"
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(tmp_path / "sealed.pth")
    if noticed_without:
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(tmp_path / "unsealed.pth")


@pytest.mark.parametrize("damage", ["another compression", "a first block of zeros"])
def test_a_file_of_another_format_is_refused_before_pytorch_reads_it(tmp_path, monkeypatch, damage):
    """zlib fails on a record that is not compressed. PyTorch tries what is no zip file as a tar
    file.
    """
    path = tmp_path / "published.pth"
    torch.save({"model": {"a": torch.arange(4000)}}, path)
    data = path.read_bytes()
    if damage == "another compression":
        data = replaced(data, in_directory(data, "published/data/0") + 10, b"\x08")
    else:
        data = replaced(data, 0, bytes(512))
    path.write_bytes(data)
    monkeypatch.delattr(torch, "load")
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(path)


def test_when_all_are_damaged_nothing_is_started_afresh(tmp_path):
    CheckpointFolder(tmp_path, 2).save(content(1), TrainingPosition(1, 0))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="all 2 checkpoints.*are damaged.*move them away"):
        CheckpointFolder(tmp_path, 2).newest_good()


def test_damaged_files_do_not_push_out_good_ones(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for epoch in (1, 2, 3):
        folder.save(content(epoch), TrainingPosition(epoch, 0))
    (tmp_path / "resume_0003_000000000.pth").write_bytes(b"")
    again = CheckpointFolder(tmp_path, keep=2)
    assert again.newest_good()[0].name == "resume_0002_000000000.pth"
    again.save(content(25), TrainingPosition(2, 50))
    assert number_in(tmp_path / "resume_0002_000000000.pth") == 2, "one good one beside the newest"


# ---- a disk that fails


def failing(monkeypatch, times: int, error=None):
    """torch.save fails so many times."""
    left = [times]
    save = torch.save

    def fail(what, file):
        if left[0]:
            left[0] -= 1
            file.write(b"half of it")
            raise error or OSError(errno.ENOSPC, "No space left on device")
        save(what, file)

    monkeypatch.setattr(torch, "save", fail)


def test_a_failed_write_is_tried_again(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, 2)
    assert CheckpointFolder(tmp_path, 2).save(content(1), TrainingPosition(1, 0))
    assert caplog.text.count("trying again") == 2
    assert names(tmp_path) == ["checkpoint.pth", "resume_0001_000000000.pth"]


def test_as_many_lost_saves_as_are_kept_end_the_run_and_no_sooner(tmp_path, monkeypatch, caplog):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(content(1), TrainingPosition(1, 0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    failing(monkeypatch, 6)
    assert folder.save(content(2), TrainingPosition(2, 0)) is None
    assert "training continues, and ends if 1 more can't be written" in caplog.text
    with pytest.raises(
        NotSavedError, match=r"No space left.*the last good one is .*resume_0001.*--resume auto"
    ):
        folder.save(content(3), TrainingPosition(3, 0))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert folder.save(content(3), TrainingPosition(3, 0)), "room again"
    failing(monkeypatch, 3)
    assert folder.save(content(4), TrainingPosition(4, 0)) is None, "counted from the last success"
    failing(monkeypatch, 3)
    with pytest.raises(NotSavedError):
        folder.save(content(4), TrainingPosition(4, 0), must=True)


def test_a_rename_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(content(1), TrainingPosition(1, 0))
    before = names(tmp_path)

    def no_rename(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.os, "replace", no_rename)
    assert folder.save(content(2), TrainingPosition(2, 0)) is None
    assert names(tmp_path) == before


def test_a_log_that_cannot_be_written_is_caught_up_on(tmp_path, caplog):
    history = History(tmp_path / "gone" / "log.txt")
    history.finish_epoch({"epoch": 0})
    assert "training continues, the next epoch tries again" in caplog.text
    (tmp_path / "gone").mkdir()
    history.finish_epoch({"epoch": 1})
    history.finish_epoch({"epoch": 2})
    lines = (tmp_path / "gone" / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


def test_the_best_is_chosen_by_masks_where_there_are_some(caplog):
    """Boxes of a frozen detector never change; and an older version chose by boxes."""
    caplog.set_level(logging.INFO)
    history, summary = History(None), EpochSummary(3, "exps/run")
    history.best = {"AP": 0.5, "epoch": 0, "weights": "model"}
    chosen = []
    for epoch, masks in enumerate([0.1, 0.4, 0.4]):
        stats = {"coco_eval_bbox": [0.5] * 12, "coco_eval_masks": [masks] * 12}
        chosen.append(history.is_best(*Evaluation(stats, [], {}).best_by, epoch, "model"))
        line = {"epoch": epoch, "test_loss": 1.0} | {f"test_{key}": value for key, value in stats.items()}
        summary.epoch(line, history.best, "")
    assert chosen == [True, True, False]
    assert "AP 50.0  mask AP 40.0  best mask AP 40.0 (epoch 1)" in caplog.messages[-1]
    summary.finish(history.best)
    assert "best mask AP 40.0 (epoch 1): exps/run/checkpoint_best.pth" in caplog.messages
    assert Evaluation({"coco_eval_bbox": [0.25] * 12}, [], {}).best_by == ("AP", 0.25)


def test_an_output_that_goes_to_a_full_disk_does_not_end_a_run(tmp_path):
    write_coco(tmp_path / "data", 2)
    flags = ["--coco_path", str(tmp_path / "data"), *SMALL_IMAGES, *SMALL_MODEL, "--epochs", "1"]
    flags += ["--output_dir", str(tmp_path / "o")]
    result = run("sh", "-c", f"exec python main.py {' '.join(flags)} >/dev/full")
    assert result.returncode == 0, result.stderr
    assert "Exception" not in result.stderr
    assert json.loads((tmp_path / "o" / "log.txt").read_text())["epoch"] == 0


# ---- an earlier run in the folder


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path):
    write_coco(tmp_path / "data", 4, 2)
    out = tmp_path / "out"
    flags = (
        "--coco_path",
        str(tmp_path / "data"),
        *SMALL_IMAGES,
        *SMALL_MODEL,
        "--lr_drop",
        "2",
        "--output_dir",
        str(out),
    )
    assert run_main_forked(*flags, "--epochs", "4").returncode == 0
    log = (out / "log.txt").read_text()
    again = run_main_forked(*flags, "--epochs", "3", "--resume", str(out / "checkpoint0001.pth"))
    assert again.returncode == 0, again.stderr
    assert (out / "log.txt").read_text().splitlines() == log.splitlines()[:3]
    assert (out / "earlier-1" / "log.txt").read_text() == log
    assert "resume_0004_000000000.pth" in names(out / "earlier-1")
    assert not (out / "earlier-1" / "checkpoint0001.pth").exists()
    _, newest = CheckpointFolder(out, 2).newest_good()
    assert newest["position"] == {"epoch": 3, "images": 0}


def test_a_move_that_was_interrupted_is_finished(tmp_path):
    for name in ("checkpoint.pth", "resume_0001_000000000.pth", "log.txt"):
        (tmp_path / name).write_text(name)
    earlier = tmp_path / "earlier-1"
    earlier.mkdir()
    (earlier / ".moving").write_text("checkpoint.pth\nresume_0001_000000000.pth\nlog.txt")
    (tmp_path / "checkpoint.pth").rename(earlier / "checkpoint.pth")
    with RunFolder.open(config_for(tmp_path)) as folder:
        pass
    assert names(earlier) == ["checkpoint.pth", "log.txt", "resume_0001_000000000.pth"]
    folder.begin(History(None))
    assert names(tmp_path) == ["earlier-1"], "nothing to move"


def test_all_that_a_run_leaves_is_set_aside_together(tmp_path):
    """A report of the new run must not find the figures of the old one."""
    of_a_run = [
        "checkpoint.pth",
        "checkpoint0004.pth",
        "checkpoint_best.pth",
        "eval",
        "eval.pth",
        "eval_ema.pth",
        "log.txt",
        "nonfinite_0003_000120_process0.pth",
        "predictions.json",
        "predictions_ema.json",
        "resume_0001_000000000.pth",
        "run.json",
        "tensorboard",
    ]
    for name in [*of_a_run, "notes.md"]:
        (tmp_path / name).write_text(name)
    with RunFolder.open(config_for(tmp_path)) as folder:
        assert names(tmp_path) == sorted([*of_a_run, ".held", ".new_run", "notes.md"]), "not moved yet"
        folder.begin(History(None))
    assert names(tmp_path) == ["earlier-1", "notes.md"]
    assert sorted(path.name for path in (tmp_path / "earlier-1").iterdir()) == sorted(of_a_run)


def test_the_checkpoint_of_the_folder_is_read_once(tmp_path, monkeypatch):
    CheckpointFolder(tmp_path, 2).save(content(3), TrainingPosition(1, 0))
    read = []
    monkeypatch.setattr(
        util.run.checkpoints, "read_checkpoint", lambda path: read.append(path) or read_checkpoint(path)
    )
    with RunFolder.open(config_for(tmp_path, "--resume", "auto")) as folder:
        assert folder.resumes
        assert folder.from_folder
        assert folder.checkpoint == content(3)
        folder.begin(History(None))
        assert folder.checkpoint is None, "released"
    assert len(read) == 1


@pytest.mark.parametrize("used", [False, True])
def test_an_evaluation_that_fails_leaves_no_folder(tmp_path, used):
    out = tmp_path / "out"
    if used:
        out.mkdir()
        (out / "log.txt").touch()
    config = config_for(out, "--eval", "--resume", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="does not exist"), RunFolder.open(config):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "log.txt"] if used else [])


def config_for(folder: Path, *flags: str):
    return parse_config(["--output_dir", str(folder), *flags])
