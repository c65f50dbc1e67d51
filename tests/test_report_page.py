"""The page of tools/report.py in a real browser: what it shows, and that it can be worked with. Skipped without Chromium."""

from __future__ import annotations

import json
import shutil

import pytest

from datasets.coco_format import read_annotations
from tests.chromium import browser, find_chromium
from tests.report_runs import CATEGORIES, detections_of, log_row, write_data, write_run
from tools.report_page.make import make_page
from util.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="needs Chromium (apt-get install chromium, or its path in $CHROMIUM)"
)
SECTIONS = ["summary", "curves", "figures", "classes", "precision-recall", "mistakes", "configuration"]
TICKS = "[...svg.querySelectorAll('text.axis')].map((text) => text.textContent)"
ROWS = "[...document.querySelectorAll('{} tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser"), find_chromium()) as tab:
        yield tab


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder, coco = tmp_path_factory.mktemp("runs"), read_annotations(data)
    plain = write_run(folder / "plain", data, detections_of(coco, 1))
    other = write_run(folder / "batchformer", data, detections_of(coco, 2, noise=3), 6, "--bf", "1", "--insert_idx", "0")
    return plain, write_run(other, data, detections_of(coco, 3), prefix="ema_")


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "report.html"
    make_page(runs, output, num_pictures=4)
    return output


def rows(page, selector: str) -> list[list[str]]:
    return page.value(ROWS.format(selector))


def stats(folder, prefix="") -> list[float]:
    return read_checkpoint(folder / "eval" / f"{prefix}latest.pth")["stats"]


def percent(value: float) -> str:
    return "–" if value < 0 else f"{100 * value:.1f}"


def assert_quiet(page, path) -> None:
    """Nothing in the console, and nothing asked for but the file and what it holds."""
    assert page.problems == []
    assert {url for url in page.requests if not url.startswith("data:")} == {path.resolve().as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_every_section_is_drawn_at_any_width(page, report, scheme, width):
    page.open(report, width=width, scheme=scheme)
    page.settle()
    assert page.value("[...document.querySelectorAll('main > section')].map((s) => s.id)") == SECTIONS
    assert page.value("[...document.querySelectorAll('main > section')].every((s) => s.children.length > 1)")
    assert page.value("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    assert page.value("document.documentElement.dataset.theme") == scheme
    assert page.value("document.querySelectorAll('#curves .chart path.curve').length") > 20
    assert_quiet(page, report)


def test_the_figures_are_those_that_were_put_in(page, report, runs):
    page.open(report)
    shown = rows(page, "#figures")
    given = [stats(runs[0]), stats(runs[1]), stats(runs[1], "ema_")]
    assert [row[0] for row in shown][:4] == ["AP", "AP50", "AP75", "AP small"] and len(shown) == 12
    for i, row in enumerate(shown):
        assert row[1] == percent(given[0][i])
        for cell, values in zip(row[2:], given[1:], strict=True):
            value, *change = cell.split()
            assert value == percent(values[i])
            if values[i] >= 0:
                expected = f"{100 * (values[i] - given[0][i]):+.1f}".replace("-", "−")
                assert change == ["±0.0" if expected in ("+0.0", "−0.0") else expected]
    assert page.text(".tile .value").split()[0] in (percent(given[1][0]), percent(given[2][0]))
    summary = rows(page, "#summary")
    assert summary[0][0] == "plain" and summary[0][1] == "6 of 6 epochs" and "1.23 M" in summary[0]
    assert ["--bf", "0", "1"] in summary and ["--insert_idx", "–", "0"] in summary, "the flags that differ"
    assert not any(row[0] == "--lr" for row in summary)


def test_classes_are_filtered_and_sorted_by_clicks(page, report):
    page.open(report)
    first = rows(page, "#classes")
    assert [row[0] for row in first] == ["all classes", *CATEGORIES.values()]
    page.click("#classes th button", 0)
    names = [row[0] for row in rows(page, "#classes")]
    assert names[0] == "all classes" and names[1:] == sorted(CATEGORIES.values())
    page.click("#classes th button", 2)
    values = [float(row[2]) for row in rows(page, "#classes")[1:]]
    assert values == sorted(values, reverse=True)
    page.click("#classes th button", 2)
    assert [float(row[2]) for row in rows(page, "#classes")[1:]] == sorted(values)
    page.click("#class-filter")
    page.type("CAT")
    assert [row[0] for row in rows(page, "#classes")] == ["all classes", CATEGORIES[17]]
    assert "1 of 3 classes" in page.text("#classes .count")
    page.choose("#class-view", "result:1")
    assert page.value("document.querySelectorAll('#classes thead th').length") == 9
    assert [row[0] for row in rows(page, "#classes")] == ["all classes", CATEGORIES[17]], "the filter stays"
    assert page.problems == []


def test_a_curve_tells_its_values_and_is_zoomed(page, report, runs):
    page.open(report)
    entries = [json.loads(line) for line in (runs[0] / "log.txt").read_text().splitlines()]
    x, y = page.place("#curves .chart > svg", 0, across=0.999)
    page.mouse("mouseMoved", x, y)
    page.settle()
    assert not page.value("document.querySelector('#tip').hidden")
    told = page.text("#tip")
    assert told.startswith("epoch 5") and percent(entries[-1]["test_coco_eval_bbox"][0]) in told and "batchformer · AP50" in told
    labels = f"[...document.querySelectorAll('#curves .chart > svg')].map((svg) => {TICKS})"
    before = page.value(labels)
    page.drag("#curves .chart > svg", 1, 0.5, 0.9)
    after = page.value(labels)
    assert all(a != b for a, b in zip(before, after, strict=True)), "all curves are zoomed together"
    assert all("0" not in ticks[-4:-1] for ticks in after)
    page.click("#curves .chart > svg", 1, clicks=2)
    assert page.value(labels) == before
    page.drag("#curves .chart > svg", 1, 0.4, 0.8)
    page.click("#curves .reset", 0)
    assert page.value(labels) == before
    assert page.problems == []


def test_the_axis_of_a_precision_that_stays_0_begins_there(page, data, tmp_path):
    nowhere = [detection | {"bbox": [0, 0, 1, 1]} for detection in detections_of(read_annotations(data), 1)]
    run = write_run(tmp_path / "first", data, nowhere)
    make_page([run], tmp_path / "report.html")
    page.open(tmp_path / "report.html")
    heights = [float(tick) for tick in page.value(f"((svg) => {TICKS})(document.querySelector('#curves .chart > svg'))")[:3]]
    assert heights[0] == 0 and heights == sorted(heights)


def test_curves_are_read_and_zoomed_by_the_keyboard(page, report):
    page.open(report)
    page.value("document.querySelector('#curves .chart > svg').focus()")
    for _ in range(2):
        page.press("ArrowRight")
    assert page.text("#tip").startswith("epoch 1")
    ticks = f"((svg) => {TICKS})(document.querySelectorAll('#curves .chart > svg')[1])"
    before = page.value(ticks)
    page.press("+", "+")
    assert page.value(ticks) != before
    page.press("0", "0")
    assert page.value(ticks) == before


def test_runs_and_lines_are_chosen(page, report):
    page.open(report)
    lines = "document.querySelectorAll('#curves .chart > svg')[1].querySelectorAll('path.curve').length"
    assert page.value(lines) == 4
    page.click(".chip", 0)
    assert page.value(lines) == 2 and page.value("document.querySelector('.chip').getAttribute('aria-pressed')") == "false"
    kinds = page.value("[...document.querySelectorAll('.shot .run-name')].map((n) => n.textContent)")
    assert "plain" not in kinds
    page.click(".chip", 1)
    assert page.value("document.querySelectorAll('#curves .chart > svg')[1].textContent") == "nothing chosen"
    page.click(".chip", 0)
    page.click(".chip", 1)
    page.click("#curves .chart:nth-child(2) .key button", 1)
    assert page.value(lines) == 2
    page.choose("#any-figure", "train_loss_ce")
    assert page.value("[...document.querySelectorAll('#curves .chart')].at(-1).querySelectorAll('path.curve').length") == 2
    assert page.problems == []


def test_precision_recall_is_chosen_by_class_and_iou(page, report, runs):
    page.open(report)
    paths = "[...document.querySelectorAll('#precision-recall path.curve')].map((p) => p.getAttribute('d'))"
    whole = page.value(paths)
    assert len(whole) == 3
    assert page.text("#precision-recall .chips").split()[1] == percent(stats(runs[0])[1])
    page.choose("#pr-iou", "0.75")
    assert page.text("#precision-recall .chips").split()[1] == percent(stats(runs[0])[2])
    page.choose("#pr-class", "2")
    assert page.value(paths) != whole
    assert page.problems == []


def test_mistakes_are_filtered_and_enlarged_by_clicks(page, report):
    page.open(report)
    costs = rows(page, "#mistakes")
    assert len(costs) == 6 and costs[0][0].startswith("wrong class")
    kinds = "[...new Set([...document.querySelectorAll('.shot')].map((shot) => shot.dataset.kind))]"
    assert set(page.value(kinds)) >= {"class", "localisation"}
    page.choose("#mistake-kind", "missed")
    assert page.value(kinds) == ["missed"]
    page.choose("#mistake-run", "1")
    names = "[...new Set([...document.querySelectorAll('.shot .run-name')].map((name) => name.textContent))]"
    assert page.value(names) == ["batchformer"]
    page.choose("#mistake-run", "")
    page.choose("#mistake-kind", "")
    page.choose("#mistake-class", "17")
    words = page.value("[...document.querySelectorAll('.shot')].map((shot) => shot.innerText)")
    assert words and all(CATEGORIES[17] in word for word in words if "near" in word or "is " in word or "missed" in word)
    sources = page.value("[...document.querySelectorAll('.shot image')].map((image) => image.getAttribute('href'))")
    assert len(sources) == len(words) and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    page.click(".shot", 0)
    assert page.value("document.querySelector('#zoom').open")
    first = page.text("#zoom .words")
    assert "1 of" in first and ".jpg" in first
    assert page.value("document.querySelectorAll('#zoom svg rect.object, #zoom svg rect.found').length") >= 1
    page.click("#zoom .step-next")
    assert "2 of" in page.text("#zoom .words")
    page.press("ArrowLeft")
    assert page.text("#zoom .words") == first
    page.click("#zoom .close")
    assert not page.value("document.querySelector('#zoom').open")
    assert page.problems == []


def test_the_theme_is_changed_by_a_click(page, report):
    page.open(report, scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.value(paper)
    page.click("#theme")
    assert page.value(paper) != light
    page.click("#theme")
    assert page.value(paper) == light
    page.value("localStorage.clear()")


def test_flags_are_folded_and_filtered(page, report):
    page.open(report)
    assert not page.value("document.querySelector('#all-flags').open")
    page.click("#all-flags summary")
    assert page.value("document.querySelector('#all-flags').open")
    names = [row[0] for row in rows(page, "#all-flags")]
    assert {"--bf", "--insert_idx"} <= set(names[:3]) and len(names) > 60, "those that differ first"
    page.click("#flag-filter")
    page.type("learning rate")
    assert "--lr" in [row[0] for row in rows(page, "#all-flags")] and len(rows(page, "#all-flags")) < 10


def test_names_are_never_markup(page, report):
    page.open(report)
    assert page.value("[...document.querySelectorAll('b')].every((b) => b.textContent !== 'dog')")
    assert CATEGORIES[1000] in [row[0] for row in rows(page, "#classes")]


def test_runs_that_have_only_begun(page, runs, tmp_path):
    for name, kept in (("begun", ["run.json"]), ("young", ["log.txt"])):
        (tmp_path / name).mkdir()
        for file in kept:
            shutil.copy(runs[0] / file, tmp_path / name)
    (tmp_path / "young" / "log.txt").write_text(json.dumps({k: v for k, v in log_row(0).items() if "test" not in k}) + '\n{"epo')
    make_page([tmp_path / "begun", tmp_path / "young"], tmp_path / "report.html")
    page.open(tmp_path / "report.html")
    notes = page.value("[...document.querySelectorAll('.notes li')].map((n) => n.textContent)")
    assert any(note.startswith("begun: has no log.txt yet") for note in notes)
    assert all(page.value(f"document.querySelector('#{name} .note') !== null") for name in ("figures", "classes", "mistakes"))
    assert page.value("document.querySelectorAll('#curves path.curve').length") > 0
    assert_quiet(page, tmp_path / "report.html")


def test_eighty_classes_and_twenty_runs(page, tmp_path):
    annotations = write_data(tmp_path / "coco", images=60, categories={i: f"class number {i}" for i in range(1, 81)})
    coco = read_annotations(annotations)
    folders = [write_run(tmp_path / "exps" / "one", annotations, detections_of(coco, 0), 50)]
    for i in range(1, 20):  # links would do for the page; copies are what people have
        folders.append(shutil.copytree(folders[0], tmp_path / "exps" / f"a run with a rather long name {i}"))
    size = make_page(folders, tmp_path / "report.html")
    assert size < 10e6
    page.open(tmp_path / "report.html", width=1280)
    assert len(rows(page, "#classes")) == 81
    dots = "[...document.querySelectorAll('.chip .dot')].map((dot) => getComputedStyle(dot).backgroundColor)"
    assert len(set(page.value(dots))) == 20
    assert page.value("document.documentElement.scrollWidth") <= 1280
    assert_quiet(page, tmp_path / "report.html")
