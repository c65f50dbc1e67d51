"""The page of tools/report.py in a real browser: what it shows, and that it can be worked with.

No page that a test opens may write to its console or request anything. Without playwright or
Chromium they are skipped.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

from datasets.coco_format import read_annotations
from tests.helpers import PATIENCE
from tests.report_runs import (
    CATEGORIES,
    detections_of,
    log_row,
    with_masks,
    write_ablation,
    write_data,
    write_run,
)
from tools.ablation import page as ablation_page
from tools.ablation.summary import summarise
from tools.report_page.make import make_page
from util.checkpoint import read_checkpoint

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (apt-get install chromium, or its path in $CHROMIUM)"
)
SECTIONS = ["summary", "curves", "metrics", "classes", "precision-recall", "mistakes", "configuration"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        playwright.expect.set_options(timeout=1000 * PATIENCE)
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """Opens a file. After the test its console must be empty, and it must have asked for nothing."""
    opened = []

    def open_file(path, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(1000 * PATIENCE)
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        opened.append((page, messages, requests, path.resolve().as_uri()))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_file
    for page, messages, requests, address in opened:
        page.close()
        assert messages == []
        assert {url for url in requests if not url.startswith(("data:", "blob:"))} == {address}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder, coco = tmp_path_factory.mktemp("runs"), read_annotations(data)
    plain = write_run(folder / "plain", data, detections_of(coco, 1))
    other = write_run(
        folder / "batchformer", data, detections_of(coco, 2, noise=3), 6, "--bf", "1", "--insert_idx", "0"
    )
    return plain, write_run(other, data, detections_of(coco, 3), prefix="ema_")


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "report.html"
    make_page(runs, output, num_pictures=4)
    return output


def rows(page, section: str) -> list[list[str]]:
    script = "rows => rows.map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"
    return page.locator(f"{section} tbody tr").evaluate_all(script)


def texts(page, selector: str) -> set[str]:
    return set(page.locator(selector).all_text_contents())


def lines(page, section: str) -> list[dict]:
    """The lines that a chart shows, with the values that plotly drew."""
    script = """plot => plot._fullData.filter(
        (line) => line.visible === true && line.xaxis && line.x[0] !== null)
      .map(({ meta, name, xaxis, x, y }) => ({ meta, name, xaxis, x: [...x], y: [...y] }))"""
    return page.locator(f"{section} .js-plotly-plot").evaluate(script)


def ranges(page) -> list[list[float]]:
    """First and last epoch of each panel."""
    script = (
        "plot => Object.entries(plot._fullLayout).filter(([key]) => /^xaxis/.test(key)).map(([, "
        "axis]) => axis.range)"
    )
    return page.locator("#curves .js-plotly-plot").evaluate(script)


def stats(folder, prefix="") -> list[float]:
    return read_checkpoint(folder / "eval" / f"{prefix}latest.pth")["stats"]


def percent(value: float) -> str:
    return "–" if value < 0 else f"{100 * value:.1f}"


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (768, "dark"), (1280, "light"), (1920, "dark")]
)
def test_every_section_is_drawn_at_any_width(show, report, scheme, width):
    page = show(report, width, scheme)
    sections = page.locator("main > section")
    assert sections.evaluate_all("sections => sections.map((section) => section.id)") == SECTIONS
    assert sections.evaluate_all("sections => sections.every((section) => section.children.length > 1)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    ground = {"light": "rgb(252, 252, 251)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    boxes = [area.bounding_box() for area in page.locator("#curves .nsewdrag").all()]
    assert (
        len(boxes) == 9
        and min(box["width"] for box in boxes) > 200
        and min(box["height"] for box in boxes) > 100
    )


def test_the_figures_are_those_that_were_put_in(show, report, runs):
    page = show(report)
    shown = rows(page, "#metrics")
    given = [stats(runs[0]), stats(runs[1]), stats(runs[1], "ema_")]
    assert [row[0] for row in shown][:4] == ["AP", "AP50", "AP75", "AP small"] and len(shown) == 12
    for i, row in enumerate(shown):
        assert row[1] == percent(given[0][i])
        for cell, values in zip(row[2:], given[1:], strict=True):
            value, *change = cell.split()
            assert value == percent(values[i])
            if values[i] >= 0:
                shown_change = float(value) - float(percent(given[0][i]))
                expected = f"{shown_change:+.1f}".replace("-", "−")
                assert change == ["±0.0" if expected in ("+0.0", "−0.0") else expected]
    tile = page.locator(".tile .value").first.inner_text()
    assert tile.split()[0] in (percent(given[1][0]), percent(given[2][0]))
    summary = rows(page, "#summary")
    assert summary[0][0] == "plain" and summary[0][1] == "6 of 6 epochs" and "1.23 M" in summary[0]
    assert ["--bf", "0", "1"] in summary and ["--insert_idx", "–", "0"] in summary, "the flags that differ"
    assert not any(row[0] == "--lr" for row in summary)


def test_classes_are_filtered_and_sorted_by_clicks(show, report):
    page = show(report)
    assert [row[0] for row in rows(page, "#classes")] == ["all classes", *CATEGORIES.values()]
    heads = page.locator("#classes th button")
    heads.nth(0).click()
    names = [row[0] for row in rows(page, "#classes")]
    assert names[0] == "all classes" and names[1:] == sorted(CATEGORIES.values())
    heads.nth(2).click()
    values = [float(row[2]) for row in rows(page, "#classes")[1:]]
    assert values == sorted(values, reverse=True)
    heads.nth(2).click()
    assert [float(row[2]) for row in rows(page, "#classes")[1:]] == sorted(values)
    page.fill("#class-filter", "CAT")
    assert [row[0] for row in rows(page, "#classes")] == ["all classes", CATEGORIES[17]]
    assert "1 of 3 classes" in page.inner_text("#classes .count")
    page.select_option("#class-view", "result:1")
    assert page.locator("#classes thead th").count() == 9
    assert [row[0] for row in rows(page, "#classes")] == ["all classes", CATEGORIES[17]], "the filter stays"


def test_curves_tell_their_values_and_are_zoomed_together(show, report, runs):
    page = show(report)
    last = json.loads((runs[0] / "log.txt").read_text().splitlines()[-1])
    area = page.locator("#curves .nsewdrag").first
    area.hover(position={"x": area.bounding_box()["width"] - 20, "y": 60})
    read = playwright.expect(page.locator("#curves .hoverlayer"))
    read.to_contain_text("epoch 5plain · AP50 : ")
    read.to_contain_text(f"plain · AP : {100 * last['test_coco_eval_bbox'][0]:.4g}%")
    before = ranges(page)
    third = page.locator("#curves .nsewdrag").nth(2).bounding_box()
    page.mouse.move(third["x"] + 0.5 * third["width"], third["y"] + 50)
    page.mouse.down()
    page.mouse.move(third["x"] + 0.9 * third["width"], third["y"] + 50, steps=5)
    page.mouse.up()
    after = ranges(page)
    assert len(after) == 9 and all(one == after[0] for one in after)
    assert before[0][0] < 1 < after[0][0] < 3 < 4 < after[0][1] < 5
    page.locator("#curves .plot").get_by_label("Reset axes").click()
    assert ranges(page) == before
    drawing, height = page.locator("#curves .main-svg").first, area.bounding_box()["height"]
    width = drawing.get_attribute("width")
    page.set_viewport_size({"width": 1200, "height": 900})
    playwright.expect(drawing).not_to_have_attribute("width", width)
    assert area.bounding_box()["height"] == pytest.approx(height, abs=1)


def test_runs_are_chosen_by_chips_and_legend(show, report):
    page = show(report)
    chips = page.locator(".chip")
    assert {line["meta"] for line in lines(page, "#curves")} == {0, 1}
    chips.first.click()
    assert chips.first.get_attribute("aria-pressed") == "false"
    for section in ("#curves", "#precision-recall"):
        assert {line["meta"] for line in lines(page, section)} == {1}
    assert "plain" not in texts(page, ".shot .run-name")
    chips.first.click()
    drawn = page.locator("#curves .scatterlayer path.js-line")
    both = drawn.count()
    page.locator("#curves .legendtoggle").nth(1).click()
    playwright.expect(drawn).to_have_count(both // 2)
    assert {line["meta"] for line in lines(page, "#curves")} == {0}


def test_precision_recall_is_chosen_by_class(show, report, runs):
    page = show(report)
    table = read_checkpoint(runs[0] / "eval" / "latest.pth")["precision"][0, :, :, 0, -1]
    assert len(lines(page, "#precision-recall")) == 9
    assert lines(page, "#precision-recall")[0]["y"] == pytest.approx(
        (100 * table.mean(1)).tolist(), abs=0.051
    )
    page.select_option("#pr-class", label=CATEGORIES[17])
    assert lines(page, "#precision-recall")[0]["y"] == pytest.approx((100 * table[:, 1]).tolist(), abs=0.051)
    assert {line["name"] for line in lines(page, "#precision-recall")} >= {"batchformer · averaged"}


def test_mistakes_are_filtered_and_enlarged_by_clicks(show, report):
    page = show(report)
    costs = rows(page, "#mistakes")
    assert len(costs) == 6 and costs[0][0].startswith("wrong class")
    shots = page.locator(".shot")
    kinds = "shots => [...new Set(shots.map((shot) => shot.dataset.kind))]"
    assert set(shots.evaluate_all(kinds)) >= {"class", "localisation"}
    page.select_option("#mistake-kind", "missed")
    assert shots.evaluate_all(kinds) == ["missed"]
    page.select_option("#mistake-run", "1")
    assert texts(page, ".shot .run-name") == {"batchformer"}
    page.select_option("#mistake-run", "")
    page.select_option("#mistake-kind", "")
    page.select_option("#mistake-class", "17")
    words = shots.all_inner_texts()
    assert words and all(
        CATEGORIES[17] in word for word in words if "near" in word or "is " in word or "missed" in word
    )
    href = "images => images.map((image) => image.getAttribute('href'))"
    sources = page.locator(".shot image").evaluate_all(href)
    assert len(sources) == len(words) and all(
        source.startswith("data:image/jpeg;base64,") for source in sources
    )
    shots.first.click()
    assert page.locator("#zoom").is_visible()
    first = page.inner_text("#zoom .words")
    assert "1 of" in first and ".jpg" in first
    assert page.locator("#zoom svg rect.object, #zoom svg rect.found").count() >= 1
    page.click("#zoom .step-next")
    assert "2 of" in page.inner_text("#zoom .words")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#zoom .words") == first
    page.click("#zoom .close")
    assert not page.locator("#zoom").is_visible()


def test_masks_are_beside_boxes(show, runs, data, tmp_path):
    """A run with masks after one without: figures, curves, classes, and the worst masks as outlines."""
    coco = read_annotations(data)
    other = write_run(tmp_path / "masks", data, with_masks(coco, detections_of(coco, 1)))
    make_page([runs[0], other], tmp_path / "report.html", num_pictures=4)
    page = show(tmp_path / "report.html")
    tables = read_checkpoint(other / "eval" / "latest.pth")
    figures = [percent(value) for value in tables["segm"]["stats"]]

    assert page.locator("#summary h3").all_text_contents()[:2] == ["Boxes", "Masks"]
    tiles = [value.split()[0] for value in page.locator(".tile .value").all_inner_texts()]
    assert tiles[6:] == figures[:6]
    heads = page.locator("#summary table").first.locator("th").all_inner_texts()
    place = heads.index("Mask AP")
    summary = rows(page, "#summary")
    assert [row[place : place + 3] for row in summary[:2]] == [
        ["–", "–", "–"],
        [figures[0], figures[1], f"{figures[0]} (5)"],
    ]
    shown = rows(page, "#metrics")
    assert [row[3] for row in shown] == figures, "without a difference: no other run has masks"
    assert [row[1] for row in shown] == [row[2].split()[0] for row in shown], "boxes are those of the other"
    page.select_option("#class-view", "metric:AP50")
    precision = tables["segm"]["precision"][0, :, :, 0, -1].mean(0)
    assert [row[-1] for row in rows(page, "#classes")[1:]] == [percent(value) for value in precision]

    drawn = {(line["meta"], line["name"]) for line in lines(page, "#curves")}
    assert (1, "masks · AP50") in drawn
    headings = page.locator("#curves .annotation-text").all_text_contents()
    assert sum(heading.startswith("Mask") for heading in headings) == 2, "two are of losses, not in the log"
    assert {line["name"] for line in lines(page, "#precision-recall")} == {
        "plain · weights",
        "masks · weights",
        "masks · masks",
    }

    page.select_option("#mistake-kind", "mask")
    worst = [float(text.split("mask IoU ")[1].split()[0]) for text in page.locator(".shot").all_inner_texts()]
    assert worst == sorted(worst) and len(worst) == 4 and worst[0] < 0.5
    assert "masks by their IoU, of detections that found their object" in page.inner_text("#mistakes")
    assert page.locator(".shot").first.locator("path.object, path.found").count() == 2
    page.locator(".shot").first.click()
    assert page.locator("#zoom path.found").count() == 1 and page.locator("#zoom rect.found").count() == 0


def test_a_chart_is_saved_as_a_picture(show, report, tmp_path):
    page = show(report)
    with page.expect_download() as download:
        page.locator("#curves .plot").get_by_label("Download").press("Enter")
    download.value.save_as(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_the_page_runs_and_asks_for_nothing_else(browser, report):
    """What the page's policy refuses, should text of a run ever become markup."""
    page = browser.new_page()
    page.goto(report.as_uri())
    refused = page.evaluate("""async () => {
      const refused = [];
      addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
      const add = (tag, values) => document.body.append(Object.assign(document.createElement(tag), values));
      add("script", { textContent: "window.strange = 1" });
      add("script", { src: "http://127.0.0.1/a.js" });
      add("img", { src: "http://127.0.0.1/a.png" });
      document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='window.strange = 1'>");
      await fetch("http://127.0.0.1/").catch(() => {});
      for (let i = 0; i < 200 && refused.length < 5; i++) await new Promise((done) => setTimeout(done, 50));
      return refused;
    }""")
    assert sorted(refused) == ["connect-src", "img-src", "script-src-attr", *["script-src-elem"] * 2]
    assert page.evaluate("window.strange") is None
    page.close()


def test_names_are_never_markup(show, runs, tmp_path):
    name = "<b>a <i>%{y} $x$ &lt; <img onerror=f()>"
    make_page([shutil.copytree(runs[0], tmp_path / name), runs[1]], tmp_path / "report.html")
    page = show(tmp_path / "report.html")
    assert page.inner_text("h1") == f"{name} · batchformer"
    assert CATEGORIES[1000] in [row[0] for row in rows(page, "#classes")]
    for section, read in (("#curves", f"{name} · AP50"), ("#precision-recall", name)):
        plot = page.locator(f"{section} .plot")
        plot.locator(".nsewdrag").first.hover()
        playwright.expect(plot.locator(".hoverlayer")).to_contain_text(read)
        playwright.expect(plot.locator(".infolayer .legend")).to_contain_text(name)
    assert "dog" not in texts(page, "b") and page.locator("main img, .plot b, .plot i").count() == 0


def test_flags_are_folded_and_filtered(show, report):
    page = show(report)
    assert not page.locator("#all-flags table").is_visible()
    page.click("#all-flags summary")
    names = [row[0] for row in rows(page, "#all-flags")]
    assert {"--bf", "--insert_idx"} <= set(names[:3]) and len(names) > 60, "those that differ first"
    page.fill("#flag-filter", "learning rate")
    assert "--lr" in [row[0] for row in rows(page, "#all-flags")] and len(rows(page, "#all-flags")) < 10


def test_an_ablation_is_a_section_with_tables_and_bands(show, runs, tmp_path):
    finals = {"bf0": [20, 22, 21, 20, 19, 23], "bf1": [21, 23.5, 22, 20.5, 20, 24]}
    variants, cells = write_ablation(tmp_path, finals)
    summary = summarise(["main.py"], variants, cells, range(6), {}) | {"missing": ["bf1, seed 6"]}
    made = ablation_page.section(summary, ["bf0", "bf1"])
    make_page(runs, tmp_path / "report.html", names=["bf0", "bf1"], num_pictures=0, ablation=made)
    page = show(tmp_path / "report.html")
    shown = rows(page, "#ablation")
    assert shown[1][:4] == ["bf1", "--bf 1", "6", "21.8 ± 1.6"]
    assert shown[2][1:6] == ["AP", "6", "+1.00", "+0.50 to +1.50", "0.031"]
    assert "bf1 against bf0: bf1 has a better AP (p = 0.031)." in page.inner_text("#ablation .notes")
    assert "Not done, and left out: bf1, seed 6." in page.inner_text("#ablation")
    # two curves with bands, and one difference with its band
    assert [line["name"] for line in lines(page, "#ablation")] == ["bf0", "bf0", "bf1", "bf1", "bf1", "bf1"]
    page.click("#chips button:first-child")
    page.wait_for_function(
        "document.querySelector('#ablation .js-plotly-plot').data[0].visible === 'legendonly'"
    )


def test_nothing_is_said_of_what_the_runs_do_not_have(show, report):
    page = show(report)
    assert page.locator("#ablation").count() == 0
    page.locator("#all-flags").evaluate("flags => flags.remove()")
    assert "mask" not in page.inner_text("main").lower()
    assert "mask" not in page.inner_text("#mistake-kind").lower()


def test_runs_that_have_only_begun(show, runs, tmp_path):
    for name, kept in (("begun", ["run.json"]), ("young", ["log.txt"]), ("alone", ["run.json"])):
        (tmp_path / name).mkdir()
        for file in kept:
            shutil.copy(runs[0] / file, tmp_path / name)
    (tmp_path / "young" / "log.txt").write_text(
        json.dumps({k: v for k, v in log_row(0).items() if "test" not in k}) + '\n{"epo'
    )
    record = json.loads((tmp_path / "alone" / "run.json").read_text())
    record["starts"].append({"changed_flags": {"lr": 1.0}, "processes": 4})
    (tmp_path / "begun" / "run.json").write_text(json.dumps(record))
    record["flags"]["eval"], record["starts"] = True, [{"checkpoint": "exps/plain/checkpoint.pth"}]
    (tmp_path / "alone" / "run.json").write_text(json.dumps(record))
    make_page([tmp_path / name for name in ("begun", "young", "alone")], tmp_path / "report.html")
    page = show(tmp_path / "report.html")
    assert any(note.startswith("begun: has no log.txt yet") for note in texts(page, ".notes li"))
    summary = rows(page, "#summary")
    assert summary[2][1] == "evaluation of exps/plain/checkpoint.pth"
    assert [summary[2][-2], summary[0][-2]] == ["–", "16, then 8"]
    assert "begun changed during the run: --lr 1.0, then 0.0002" in texts(page, "#summary p")
    assert all(page.locator(f"#{name} .note").count() for name in ("metrics", "classes", "mistakes"))
    young = lines(page, "#curves")
    assert {line["meta"] for line in young} == {1} and [10] in [line["y"] for line in young]


def test_eighty_classes_and_twenty_runs(show, tmp_path):
    annotations = write_data(
        tmp_path / "coco", images=60, categories={i: f"class number {i}" for i in range(1, 81)}
    )
    coco = read_annotations(annotations)
    folders = [write_run(tmp_path / "exps" / "one", annotations, detections_of(coco, 0), 50)]
    for i in range(1, 20):  # links would do for the page; copies are what people have
        folders.append(shutil.copytree(folders[0], tmp_path / "exps" / f"a run with a rather long name {i}"))
    size = make_page(folders, tmp_path / "report.html")
    assert size < 10e6
    page = show(tmp_path / "report.html")
    assert len(rows(page, "#classes")) == 81
    colour = "dots => [...new Set(dots.map((dot) => getComputedStyle(dot).backgroundColor))].length"
    assert page.locator(".chip .dot").evaluate_all(colour) == 20
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
