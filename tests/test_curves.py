"""Curves of runs: what is read of log.txt, and the picture of tools/plot_logs.py."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from tools import plot_logs
from util.draw.curves import PANELS, read_log, run_colors, series
from util.draw.plots import plot_run
from util.errors import UserError


def luminance(color: tuple[int, ...]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2): 0 for black, 1 for white."""
    srgb = np.asarray(color) / 255
    return float(
        np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    )


def rows(count: int, **more) -> list[dict]:
    rng = random.Random(count)
    names = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error")
    keys = [f"{split}_{name}" for split in ("train", "test") for name in names]
    return [
        {
            **{key: rng.random() for key in keys},
            "epoch": epoch,
            "train_lr": 2e-4 if epoch < 40 else 2e-5,
            "test_coco_eval_bbox": [0.01 * epoch, 0.015 * epoch, *[0.1] * 10],
            "train_grad_norm": 1.0,
            **more,
        }
        for epoch in range(count)
    ]


def write_log(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(text)
    return folder / "log.txt"


def as_text(entries: list[dict]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_read_log_gives_the_rows(tmp_path):
    assert read_log(write_log(tmp_path, as_text(rows(5)))) == rows(5)
    assert read_log(write_log(tmp_path, "")) == []
    assert read_log(write_log(tmp_path, as_text(rows(2)).replace("\n", "\n\n"))) == rows(2)
    assert np.isnan(read_log(write_log(tmp_path, '{"train_loss": NaN}\n'))[0]["train_loss"])


def test_a_half_written_last_line_is_left_out(tmp_path):
    text = as_text(rows(3)).rstrip("\n")
    last = text.rindex("\n") + 1
    for end in (last + 1, last + 20, len(text) - 1):
        assert read_log(write_log(tmp_path, text[:end])) == rows(3)[:2]
    assert read_log(write_log(tmp_path, text)) == rows(3)


@pytest.mark.parametrize("line", ['{"epoch": 1, "tr', "[1, 2]", "3", "nonsense"])
def test_an_invalid_line_in_the_middle_is_named(tmp_path, line):
    path = write_log(tmp_path, f"{json.dumps(rows(1)[0])}\n\n{line}\n{json.dumps(rows(1)[0])}\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        read_log(path)
    assert str(path) in str(caught.value)


def test_series_of_a_resumed_run_and_of_gaps():
    log = [
        {"epoch": 0, "train_loss": 3.0},
        {"epoch": 1, "train_loss": 9.0},
        {"epoch": 1, "train_loss": 2.0},
        {"epoch": 2, "test_coco_eval_bbox": [0.25, 0.5]},
        {"epoch": 3, "test_coco_eval_bbox": [-1, -1]},
        {"epoch": 4, "train_loss": None, "test_coco_eval_bbox": []},
        {"train_loss": 7.0},
    ]
    epochs, values = series(log, "train_loss")
    assert epochs.tolist() == [0, 1] and values.tolist() == [3, 2]
    for key, value in (("AP", 25), ("AP50", 50)):
        epochs, values = series(log, key)
        assert epochs.tolist() == [2] and values.tolist() == [value]
    assert len(series(log, "absent")[0]) == 0


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_every_run_has_a_colour_of_its_own(count):
    colors = run_colors(count)
    assert len(set(colors)) == count and all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    # WCAG's contrast of graphics, on a white and on a dark page
    for color in colors if count <= 7 else []:
        seen = luminance(ImageColor.getrgb(color)) + 0.05
        assert 1.05 / seen >= 3 and seen / (luminance(ImageColor.getrgb("#1b1f24")) + 0.05) >= 3, color


@pytest.fixture
def figure(monkeypatch):
    """The figure that plot_run saves."""
    saved = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (saved.append(self), original(self, path))[1])
    return saved


def test_every_run_is_in_every_panel(tmp_path, figure):
    logs = {"baseline": rows(50), "_a $dollar$ run": rows(12)}
    plot_run(logs, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 1500
    (page,) = figure
    titles = [axes.get_title(loc="left").split(" (")[0] for axes in page.axes]
    assert titles == [panel.title for panel in PANELS]
    for axes in page.axes:
        lines = axes.get_lines()
        assert len({line.get_color() for line in lines}) == len(logs)
        assert len(lines) in (2, 4, 6)
        assert {tuple(line.get_xdata()) for line in lines} == {tuple(range(50)), tuple(range(12))}
    assert len(page.legends[0].get_texts()) == len(logs)


def test_averaged_weights_have_a_line_of_their_own(tmp_path, figure):
    averaged = rows(9, test_ema_coco_eval_bbox=[0.5] * 12)
    plot_run({"plain": rows(9), "averaged": averaged}, tmp_path / "curve.png")
    (axes,) = [axes for axes in figure[0].axes if "Average" in axes.get_title(loc="left")]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["AP", "AP50", "AP averaged"]
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [[50.0] * 9]


def test_masks_have_panels_of_their_own(tmp_path, figure):
    masks = rows(9, test_coco_eval_masks=[0.25] * 12, test_ema_coco_eval_masks=[0.5] * 12, train_loss_dice=2)
    plot_run({"boxes": rows(9), "masks": masks}, tmp_path / "curve.png")
    titles = [axes.get_title(loc="left").split(" (")[0] for axes in figure[0].axes]
    assert titles[9:] == ["Mask AP", "Mask AP by size", "Mask dice loss"]
    values = [set(line.get_ydata()) for line in figure[0].axes[9].get_lines()]
    assert values == [{25.0}, {25.0}, {50.0}]


def test_the_axis_of_a_precision_that_stays_0_begins_there(tmp_path, figure):
    plot_run({"first": rows(3, test_coco_eval_bbox=[0.0] * 12)}, tmp_path / "curve.png")
    (axes,) = [axes for axes in figure[0].axes if "Average" in axes.get_title(loc="left")]
    bottom, top = axes.get_ylim()
    assert bottom == 0 < top


def test_evaluations_every_few_epochs_are_joined(tmp_path, figure):
    log = rows(12)
    for row in log:
        if row["epoch"] % 4 != 3:
            for key in [key for key in row if key.startswith("test")]:
                del row[key]
    plot_run({"seldom": log}, tmp_path / "curve.png")
    loss = figure[0].axes[2].get_lines()
    assert [list(line.get_xdata()) for line in loss] == [[*range(12)], [3, 7, 11]]


@pytest.mark.parametrize(
    "logs",
    [
        {"one epoch": rows(1)},
        {
            "empty": [],
            "bare": [{"epoch": 0}],
            "undefined": rows(3, test_coco_eval_bbox=[-1] * 12, train_lr=0.0),
        },
        {f"run {i} {'long name ' * i}": rows(2, train_lr=1e-4 * (i + 1)) for i in range(14)},
    ],
    ids=["one", "gaps", "many"],
)
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_unusual_logs_are_drawn(tmp_path, logs):
    plot_run(logs, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_plot_run_refuses(tmp_path):
    with pytest.raises(UserError, match="no run has a row"):
        plot_run({"empty": []}, tmp_path / "curve.png")
    with pytest.raises(UserError, match=r"\.pdf, .*\.png"):
        plot_run({"run": rows(2)}, tmp_path / "curve.doc")


def test_plot_logs_takes_folders_and_files(tmp_path, capsys):
    first, second = (write_log(tmp_path / "exps" / name / "run", as_text(rows(3))) for name in "ab")
    third = write_log(tmp_path / "exps" / "c", as_text(rows(2)))
    output = tmp_path / "new" / "curve.svg"
    plot_logs.main([str(first.parent), str(second), str(third), "--output", str(output)])
    assert "<svg" in output.read_text()
    told = capsys.readouterr().out
    assert all(name in told for name in (str(first.parent), str(second), "c (2 rows)"))


@pytest.mark.parametrize(
    "text", [None, "", "half a li", '{"epoch": 0}\nbroken\n{"epoch": 1}\n', '{"loss": 1}\n']
)
def test_plot_logs_names_the_broken_log(tmp_path, text):
    if text is not None:
        write_log(tmp_path / "run", text)
    with pytest.raises(UserError) as caught:
        plot_logs.main([str(tmp_path / "run"), "--output", str(tmp_path / "curve.png")])
    assert str(tmp_path / "run") in str(caught.value) and "\n" not in str(caught.value)
