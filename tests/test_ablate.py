"""tools/ablate.py: the grid, the statistics against hand-made cases and simulations, and real runs."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO

from datasets.coco_eval import evaluate_results
from tests.helpers import BATCHFORMER, ROOT, SMALL_IMAGES, SMALL_MODEL, environment, write_coco
from tests.interval_coverage import bca_coverage, exact_coverage, experiments
from tests.processes import run_forked, wait_until
from tests.report_runs import write_ablation
from tools.ablate import main as ablate
from tools.ablation.grid import Variant, read_grid
from tools.ablation.images import _average_precision, _matches, difference_over_images
from tools.ablation.page import section
from tools.ablation.runs import Cell, Runner, _share, cells_of
from tools.ablation.statistics import exact_interval, paired_difference, sign_flip_p
from tools.ablation.summary import as_text, summarise, verdict
from util.errors import Preempted, UserError
from util.run.hold import FolderHold

# --- the grid ---


def words(*grids):
    return [(variant.name, " ".join(variant.words)) for variant in read_grid(grids)]


def test_a_grid_is_every_combination_once():
    assert words("bf=0,1 insert_idx=0,1+2") == [
        ("bf0", "--bf 0"),  # without BatchFormerV2, where it is inserted has no effect
        ("bf1_insert_idx0", "--bf 1 --insert_idx 0"),
        ("bf1_insert_idx1+2", "--bf 1 --insert_idx 1 2"),
    ]
    assert words("--lr=1e-4,2e-4") == [("lr1e-4", "--lr 1e-4"), ("lr2e-4", "--lr 2e-4")]
    assert words("two_stage=0,1 with_box_refine=1") == [
        ("two_stage0_with_box_refine1", "--with_box_refine"),
        ("two_stage1_with_box_refine1", "--two_stage --with_box_refine"),
    ]


def test_a_grid_may_be_a_file_with_names(tmp_path):
    file = tmp_path / "grid.txt"
    file.write_text(
        "# variants\nplain: bf=0\n\nmixed: bf=1 insert_idx=0  # as published\nbf=7 insert_idx=0\n"
    )
    assert words(str(file), "bf=0 epochs=9") == [
        ("plain", "--bf 0"),
        ("mixed", "--bf 1 --insert_idx 0"),
        ("bf7_insert_idx0", "--bf 7 --insert_idx 0"),
        ("bf0_epochs9", "--bf 0 --epochs 9"),
    ]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (["bf=0"], "must give two variants or more"),
        (["bff=0,1"], "did you mean bf=...?"),
        (["bf 0,1"], "there is no such file, and a grid is <flag>=<values>"),
        (["bf=0,2"], r"bf=2 must be one of \(0, 1, 7\)"),
        (["lr=a,1"], "lr='a' is no float"),
        (["dropout=0,1.5"], "dropout=1.5 must be at least 0 and below 1"),
        (["two_stage=yes,no"], "two_stage is a switch"),
        (["seed=0,1"], "seed is set by the ablation itself"),
        (["a: bf=0,1"], "a names 2 variants"),
        (["a: bf=0", "a: bf=1 insert_idx=0"], "two different variants are named a"),
        (["a: bf=0", "b: bf=0"], "b and a are the same run"),
        (["bf=0 bf=1"], "names a flag twice"),
        (["lr=1e-4+1e-5,1"], "lr takes one value, not 1e-4 and 1e-5"),
        (["grids.txt"], "grids.txt: there is no such file"),
        (["a/b: bf=0", "bf=1"], "must be letters, digits"),
    ],
)
def test_mistakes_in_a_grid(grids, message):
    with pytest.raises(UserError, match=message):
        read_grid(grids)


# --- statistics ---


def test_six_equal_signs_are_the_least_that_can_be_claimed():
    found = paired_difference([1, 2, 3, 4, 5, 6])
    assert found.mean == 3.5 and found.p == 2 / 2**6 and found.is_claim
    assert found.interval == (1, 6), "with six pairs: the smallest and the largest difference"
    assert 2 < found.bca[0] < 2.5 and 4.5 < found.bca[1] < 5
    found = paired_difference([-1, 2, 3, 4, 5, 6])
    assert found.p == 4 / 2**6 and found.interval == (-1, 6) and not found.is_claim


def test_fewer_pairs_claim_nothing():
    found = paired_difference([1, 1.1, 1.2, 0.9, 1])
    assert found.p == 2 / 2**5 and found.interval is None and not found.is_claim
    assert paired_difference([2]).p is None and paired_difference([2]).bca is None
    assert paired_difference([0.0] * 6).bca is None and not paired_difference([0.0] * 6).is_claim
    assert paired_difference([0.5] * 6).is_claim


def test_the_sign_flip_test_counts_assignments_by_hand():
    """Of the 8 assignments of signs to 1, 2, 4, those with a sum of 3 or more are 1 + 2 + 4, -1 + 2 +
    4, 1 - 2 + 4; the other side has as many.
    """
    assert sign_flip_p(np.array([1.0, -2.0, 4.0])) == 6 / 8


@pytest.mark.parametrize("pairs", [6, 7, 8, 10])
def test_the_interval_holds_what_the_test_does_not_reject(pairs):
    differences = np.random.default_rng(pairs).normal(0.5, 1, pairs)
    low, high = exact_interval(differences)
    for end, inward in ((low, 1e-6), (high, -1e-6)):
        assert sign_flip_p(differences - end - inward) > 0.05
        assert sign_flip_p(differences - end + inward) <= 0.05


def test_many_pairs_are_drawn_at_random():
    differences = np.random.default_rng(0).normal(1, 1, 40)
    low, high = exact_interval(differences)
    half = 2.02 * differences.std(ddof=1) / 40**0.5  # of Student's interval
    assert abs(low - (differences.mean() - half)) < 0.05 and abs(high - (differences.mean() + half)) < 0.05
    assert sign_flip_p(differences) < 0.001


@pytest.mark.parametrize("noise", ["normal", "laplace"])
def test_a_planted_effect_is_found_and_a_planted_nothing_is_not(noise):
    errors = experiments(noise, pairs=8, count=20_000)
    covered, found = exact_coverage(errors, 1.5)
    _, false = exact_coverage(errors, 0.0)
    assert 0.93 <= covered <= 0.97 and found >= 0.95
    assert false <= 0.05
    # which is why no claim rests on it
    assert bca_coverage(errors[:200], 1.5) < 0.93


# --- other images ---


def made_up(seed: int, num_images: int = 12):
    """Annotations and two lists of detections with different scores."""
    random = np.random.default_rng(seed)
    images = [{"id": i + 1, "width": 100, "height": 100} for i in range(num_images)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 5)]
    annotations, first, second = [], [], []
    for image in images:
        for _ in range(random.integers(0, 5)):
            box = [*random.uniform(0, 60, 2), *random.uniform(10, 40, 2)]
            kind = int(random.choice([1, 2]))
            entry = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": kind, "bbox": box}
            crowd = int(random.random() < 0.1)
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": crowd})
            for results, blur in ((first, 6), (second, 3)):
                moved = [value + random.normal(0, blur) for value in box]
                found = {"image_id": image["id"], "category_id": kind, "bbox": moved}
                results.append(found | {"score": random.random()})
    return {"images": images, "annotations": annotations, "categories": categories}, first, second


def coco_of(content) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_repeated_images(seed):
    """AP with weights against COCOeval over a data set that has each image so many times."""
    content, results, _ = made_up(seed)
    weights = np.random.default_rng(seed).integers(0, 4, len(content["images"]))
    repeated = {"images": [], "annotations": [], "categories": content["categories"]}
    detections = []
    for image, weight in zip(content["images"], weights, strict=True):
        for copy in range(weight):
            new = image["id"] * 100 + copy
            repeated["images"].append(image | {"id": new})
            for source, target in ((content["annotations"], repeated["annotations"]), (results, detections)):
                target += [entry | {"image_id": new} for entry in source if entry["image_id"] == image["id"]]
    for number, entry in enumerate(repeated["annotations"], 1):
        entry["id"] = number
    expected = evaluate_results(coco_of(repeated), detections).stats[0]
    ours = _average_precision(_matches(coco_of(content), results), weights.astype(float))
    assert ours == pytest.approx(expected, abs=1e-9)


def test_the_interval_over_images_is_around_the_difference():
    content, first, second = made_up(9, num_images=40)
    truth = coco_of(content)
    found = difference_over_images(truth, first, second)
    plain = [100 * evaluate_results(truth, results).stats[0] for results in (first, second)]
    assert found["difference"] == pytest.approx(plain[1] - plain[0], abs=1e-3)
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert difference_over_images(truth, first, first)["interval"] == [0, 0]
    assert difference_over_images(truth, [], [])["difference"] == 0


# --- tables, from folders of runs ---


def test_the_tables_say_what_the_runs_say(tmp_path):
    finals = {"bf0": [20, 22, 21, 20, 19, 23, 50], "bf1": [21, 23.5, 22, 20.5, 20, 24, None]}
    variants, cells = write_ablation(tmp_path, finals)
    summary = summarise(["main.py"], variants, cells, range(7), {"bf1, seed 0": 90.4}) | {"missing": []}
    (comparison,) = summary["comparisons"]
    assert comparison["seeds"] == [0, 1, 2, 3, 4, 5], "the seed that one variant lacks is left out"
    one = comparison["metrics"]["AP"]
    assert one["differences"] == [1, 1.5, 1, 0.5, 1, 1] and one["mean"] == 1 and one["interval"] == [0.5, 1.5]
    assert "AP large" not in comparison["metrics"]
    assert [row["epoch"] for row in comparison["by_epoch"]] == [0, 1]
    assert comparison["by_epoch"][0]["mean"] == 1
    text = as_text(summary)
    assert "bf1 has a better AP (p = 0.031)." in text and "+1.00  [+0.50, +1.50]  p = 0.031" in text
    assert "1.5 min a run" in text and "AP large" not in text
    shown = section(summary, ["bf0", "bf1"])
    assert shown["means"][1]["AP"] == [21.83, 1.63] and len(shown["chart"]["layout"]["annotations"]) == 2


def test_masks_are_columns_where_runs_have_them(tmp_path):
    variants, cells = write_ablation(tmp_path, {"bf0": [20, 22], "bf1": [21, 23]})
    assert "mask" not in as_text(summarise(["main.py"], variants, cells, range(2), {}))
    for (_, seed), cell in cells.items():
        log, masks = cell.folder / "log.txt", {"test_coco_eval_masks": [0.1 + 0.01 * seed, *[0.3] * 11]}
        log.write_text("\n".join(json.dumps(json.loads(row) | masks) for row in log.read_text().split("\n")))
    summary = summarise(["main.py"], variants, cells, range(2), {})
    assert "mask AP50" in as_text(summary)
    assert summary["comparisons"][0]["metrics"]["mask AP"]["mean"] == 0
    shown = section(summary, ["bf0", "bf1"])
    assert "mask AP" in shown["metrics"] and shown["means"][1]["mask AP"] == [10.5, 0.71]


def test_what_may_be_said(tmp_path):
    pairs = {"seeds": list(range(4)), "variant": "b", "metrics": {}}
    assert "4 pairs can't give a p below 0.125; use 6 seeds or more" in verdict(pairs)
    one = {"claim": False, "interval": [-0.2, 1.0], "mean": 0.5, "p": 0.2}
    pairs = {"seeds": list(range(6)), "variant": "b", "metrics": {"AP": one}}
    assert verdict(pairs) == "No difference of AP can be claimed. Effects from -0.20 to +1.00 fit the runs."
    worse = one | {"claim": True, "mean": -1, "interval": [-2, -0.5], "p": 0.031}
    assert verdict(pairs | {"metrics": {"AP": worse}}) == "b has a worse AP (p = 0.031)."


def test_a_run_counts_when_its_last_epoch_is_evaluated(tmp_path):
    _, cells = write_ablation(tmp_path, {"bf0": [20, None]})
    done, empty = cells.values()
    assert done.is_done() and not empty.is_done()
    record = done.folder / "run.json"
    record.write_text(json.dumps({"flags": {"epochs": 3}}))
    assert not done.is_done()


# --- commands ---


def test_the_command_of_a_run(tmp_path):
    cell = Cell(Variant("a", ("--bf", "0")), 3, tmp_path, tmp_path / "c")
    own = ["--seed", "3", "--resume", "auto", "--save_predictions"]
    assert cell.command(["python", "main.py", "--lr", "1"]) == [
        *["python", "main.py", "--lr", "1", "--bf", "0", "--output_dir", str(tmp_path)],
        *own,
    ]
    submit = ["python", "tools/run_with_submitit.py", "--nodes", "2"]
    expected = [*submit, "--job_dir", str(tmp_path), "--", "--lr", "1", "--bf", "0", *own]
    assert cell.command([*submit, "--", "--lr", "1"]) == expected


def test_cores_and_gpus_are_divided_among_the_runs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert _share(1, 2) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "6,7"}
    assert [_share(place, 8)["CUDA_VISIBLE_DEVICES"] for place in (0, 3, 5)] == ["4", "5", "6"]
    assert _share(0, 1) == {}


def test_a_run_in_a_queue_is_not_submitted_again(tmp_path, monkeypatch):
    cell = Cell(Variant("a", ()), 0, tmp_path / "cell", tmp_path / "c")
    assert not cell.is_elsewhere()
    (cell.folder / "submitit").mkdir(parents=True)
    (cell.folder / "submitit" / "41_submitted.pkl").touch()
    (cell.folder / "submitit" / "42_submitted.pkl").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cell.is_elsewhere(), "there is no Slurm"
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 41,42 ] && [ -e "$0.queue" ] && echo "42 gpu PENDING"\n')
    squeue.chmod(0o755)
    assert not cell.is_elsewhere()
    (tmp_path / "squeue.queue").touch()
    assert cell.is_elsewhere()


def test_a_run_of_another_process_is_left_to_it(tmp_path):
    cell = Cell(Variant("a", ()), 0, tmp_path, tmp_path / "c")
    with FolderHold(tmp_path):
        assert cell.is_elsewhere()
    assert not cell.is_elsewhere()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "bf=0,1", "--output_dir", "{}", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (
            ["--grid", "bf=0,1", "--output_dir", "{}", "--baseline", "bf7"],
            "bf7 is no variant of the grid: bf0",
        ),
        (["--grid", "bf=0,1", "--output_dir", "{}", "--seeds", "1", "1"], "must be different numbers"),
        (["--grid", "bf=0,1", "--output_dir", "{}", "--", "--seed", "1"], "--seed is set by the ablation"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ablate([argument.format(tmp_path) for argument in arguments])


def test_commands_are_printed_and_a_folder_belongs_to_one_command(tmp_path, capsys):
    grid = ["--grid", "bf=0,1", "--output_dir", str(tmp_path / "out"), "--seeds", "0", "1", "--print"]
    ablate([*grid, "--", "./configs/synthetic.sh", *BATCHFORMER[2:]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    ablate([*grid, "--baseline", "bf1", "--", "./configs/synthetic.sh", *BATCHFORMER[2:]])
    assert capsys.readouterr().out.splitlines() == [lines[i] for i in (1, 0, 3, 2)]
    folder = tmp_path / "out" / "bf1_seed0"
    assert lines[1] == (
        f"./configs/synthetic.sh --share_bf 0 --insert_idx 0 --bf 1 --output_dir {folder} --seed 0 "
        "--resume auto --save_predictions"
    )
    assert not (tmp_path / "out").exists(), "printing writes nothing"

    # a folder in which runs have begun
    folder.mkdir(parents=True)
    (folder / "checkpoint.pth").touch()
    record = {"command": ["./configs/synthetic.sh", "--lr", "1"], "variants": {"bf1": ["--bf", "7"]}}
    (tmp_path / "out" / "ablation.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="has runs of another command, ./configs/synthetic.sh --lr 1"):
        ablate([*grid, "--", "./configs/synthetic.sh"])
    with pytest.raises(UserError, match="has another variant bf1 "):
        ablate([*grid, "--", "./configs/synthetic.sh", "--lr", "1"])
    # without a run it is forgotten
    (folder / "checkpoint.pth").unlink()
    ablate([*grid, "--", "./configs/synthetic.sh"])


def test_a_command_that_is_none(tmp_path):
    with pytest.raises(UserError, match="./configs/nothing.sh can't be run"):
        ablate(["--grid", "bf=0,1", "--output_dir", str(tmp_path / "out"), "--", "./configs/nothing.sh"])
    assert not (tmp_path / "out").exists()


def test_a_switch_that_the_command_sets_can_not_be_off(tmp_path):
    grid = ["--grid", "two_stage=0,1", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="two_stage0 is without --two_stage, but the command has it"):
        ablate([*grid, "--", "--two_stage"])
    # a script that sets it shows in the record of the run only
    _, cells = write_ablation(tmp_path, {"bf0": [20]})
    cell = replace(cells["bf0", 0], variant=Variant("a", (), ("two_stage",)))
    assert cell.is_done()
    (cell.folder / "run.json").write_text(json.dumps({"flags": {"epochs": 2, "two_stage": True}}))
    assert cell.wrongly_on() == ["two_stage"] and not cell.is_done()


def test_runs_that_a_killed_ablation_has_left_take_a_place(tmp_path):
    """While another process of this machine runs one cell, one place of two is free."""
    variants = [Variant(name, ()) for name in "abc"]
    cells = cells_of(variants, [0], tmp_path)
    started = []

    class OnlyStarts(Runner):
        def _start(self, cell):
            started.append(cell.variant.name)
            raise Preempted("enough")

    cells[0].folder.mkdir()
    with FolderHold(cells[0].folder), pytest.raises(Preempted):
        OnlyStarts(["true"], 2, lambda *_: None).run(cells)
    assert started == ["b"]
    with FolderHold(cells[0].folder):
        runner = OnlyStarts(["true"], 1, lambda *_: None)
        assert cells[0].is_here()
        thread = threading.Timer(1, lambda: cells[0].folder.joinpath(".held").unlink())
        thread.start()
        with pytest.raises(Preempted):
            runner.run(cells)
    assert started == ["b", "a"], "it waits until the place is free"


def test_it_is_killed_and_goes_on(tmp_path):
    """A small ablation is killed in the middle, and its run with it. The same command finishes it; a
    variant that can't work is said and left out.
    """
    write_coco(tmp_path / "data", num_train=8, num_val=4)
    arguments = ["--grid", "bf=0,1", "broken: bf=0 train_sizes=500", "--output_dir", str(tmp_path / "out")]
    command = [*arguments, "--seeds", "3", "--", "--coco_path", str(tmp_path / "data"), "--epochs", "2"]
    command += [*SMALL_IMAGES, *SMALL_MODEL, *BATCHFORMER[2:], "--batch_size", "2", "--num_workers", "0"]
    log = tmp_path / "out" / "bf0_seed3" / "log.txt"
    with open(tmp_path / "first.txt", "w") as output:
        script = [sys.executable, str(ROOT / "tools" / "ablate.py"), *command]
        first = subprocess.Popen(script, stdout=output, stderr=output, env=environment(), cwd=ROOT)
        wait_until(lambda: log.exists() and log.read_text(), "the first run has no epoch")
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75, (tmp_path / "first.txt").read_text()
    assert "the same command goes on" in (tmp_path / "first.txt").read_text()
    assert not (tmp_path / "out" / "bf1_seed3").exists()

    second = run_forked("tools/ablate.py", *command)
    assert second.returncode == 2, second.stdout + second.stderr
    assert "left out: broken, seed 3 (exit code 2: error: --max_size 96 must be" in second.stdout
    assert "runs that failed and are left out: 1" in second.stderr
    assert "bf1 against bf0, 1 pair of runs" in second.stdout
    assert "Nothing can be claimed: 1 pair can't give a p below 1.000" in second.stdout
    results = json.loads((tmp_path / "out" / "ablation_results.json").read_text())
    assert [len(variant["runs"]) for variant in results["variants"]] == [1, 1, 0]
    assert results["missing"] == ["broken, seed 3"]
    runs = [run for variant in results["variants"] for run in variant["runs"]]
    assert all([epoch for epoch, _ in run["curves"]["AP"]] == [0, 1] for run in runs)
    assert "All seeds" in (tmp_path / "out" / "report.html").read_text()

    # what is done is not done again
    before = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/log.txt")}
    start = time.monotonic()
    assert run_forked("tools/ablate.py", *command).returncode == 2
    assert {path: path.stat().st_mtime for path in before} == before and time.monotonic() > start
