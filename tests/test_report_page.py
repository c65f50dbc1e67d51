"""The page of tools/report.py in a real browser: what it shows, and that it can be worked with.

No page that a test opens may write to its console or request anything. Without playwright or Chromium they
are skipped.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from PIL import Image

from datasets.coco_format import read_annotations
from tests.helpers import PATIENCE
from tests.report_runs import CATEGORIES, detections_of, log_row, write_data, write_run
from tools.report_page.make import make_page
from util.checkpoint import read_checkpoint

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (apt-get install chromium, or its path in $CHROMIUM)"
)
SECTIONS = ["summary", "curves", "figures", "classes", "precision-recall", "mistakes", "configuration"]


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
    other = write_run(folder / "batchformer", data, detections_of(coco, 2, noise=3), 6, "--bf", "1", "--insert_idx", "0")
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


def plots(page, script: str) -> list:
    """What a JavaScript expression of `plot` is for each of the curves."""
    return page.locator("#curves .plot").evaluate_all(f"plots => plots.map((plot) => {script})")


def shown_lines(page) -> list[int]:
    """How many lines each of the curves shows."""
    return plots(page, "plot.data.filter((line) => line.meta !== undefined && line.visible === true).length")


def drag(page, plot: int, start: float, end: float) -> None:
    """Press, move and release the mouse, from a share of a chart's width to another."""
    area = page.locator("#curves .plot .nsewdrag").nth(plot)
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    x, y = (lambda share: box["x"] + share * box["width"]), box["y"] + box["height"] / 2
    page.mouse.move(x(start), y)
    page.mouse.down()
    page.mouse.move(x(end), y, steps=5)
    page.mouse.up()


def stats(folder, prefix="") -> list[float]:
    return read_checkpoint(folder / "eval" / f"{prefix}latest.pth")["stats"]


def percent(value: float) -> str:
    return "–" if value < 0 else f"{100 * value:.1f}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_every_section_is_drawn_at_any_width(show, report, scheme, width):
    page = show(report, width, scheme)
    sections = page.locator("main > section")
    assert sections.evaluate_all("sections => sections.map((section) => section.id)") == SECTIONS
    assert sections.evaluate_all("sections => sections.every((section) => section.children.length > 1)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.locator("#curves .scatterlayer path.js-line").count() > 20


def test_the_figures_are_those_that_were_put_in(show, report, runs):
    page = show(report)
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


def test_a_curve_tells_its_values_and_is_zoomed(show, report, runs):
    page = show(report)
    last = json.loads((runs[0] / "log.txt").read_text().splitlines()[-1])
    area = page.locator("#curves .plot .nsewdrag").first
    area.hover(position={"x": area.bounding_box()["width"] - 2, "y": 60})
    read = playwright.expect(page.locator("#curves .plot").first.locator(".hoverlayer"))
    read.to_contain_text("epoch 5plain · AP50 : ")
    read.to_contain_text(f"plain · AP : {100 * last['test_coco_eval_bbox'][0]:.4g}%")
    ranges = "plot.layout.xaxis.range"
    before, heights = plots(page, ranges), plots(page, "plot.layout.yaxis.range")
    drag(page, 1, 0.5, 0.9)
    after = plots(page, ranges)
    assert all(one == after[0] for one in after), "all curves are zoomed together"
    assert before[0][0] < 1 < after[0][0] < 3 < 4 < after[0][1] < 5
    _, top = plots(page, "plot.layout.yaxis.range")[1]
    assert top < heights[1][1], "the values at the first epochs are out of sight, and so is their room"
    page.locator("#curves .plot").first.get_by_label("Reset axes").click()
    assert plots(page, ranges) == before and plots(page, "plot.layout.yaxis.range") == heights


def test_curves_are_read_and_zoomed_by_the_keyboard(show, report):
    page = show(report)
    plot = page.locator("#curves .plot").nth(1)
    plot.focus()
    plot.press("ArrowRight")
    plot.press("ArrowRight")
    playwright.expect(plot.locator(".hoverlayer")).to_contain_text("epoch 1plain · training : 5")
    before = plots(page, "plot.layout.xaxis.range")
    plot.get_by_label("Zoom in").press("Enter")
    assert plots(page, "plot.layout.xaxis.range") != before
    plot.get_by_label("Reset axes").press("Enter")
    assert plots(page, "plot.layout.xaxis.range") == before


def test_runs_and_lines_are_chosen(show, report):
    page = show(report)
    chips, samples = page.locator(".chip"), page.locator("#curves .plot").nth(1).locator(".legendtoggle")
    assert shown_lines(page)[1] == 4
    chips.first.click()
    assert shown_lines(page)[1] == 2 and chips.first.get_attribute("aria-pressed") == "false"
    assert "plain" not in texts(page, ".shot .run-name")
    samples.nth(1).click()
    drawn = page.locator("#curves .plot").nth(1).locator(".scatterlayer path.js-line")
    playwright.expect(drawn).to_have_count(1)
    chips.first.click()
    assert shown_lines(page)[1] == 2, "what the legend hides stays hidden"
    chips.first.click()
    chips.nth(1).click()
    assert set(shown_lines(page)) == {0}
    page.select_option("#any-figure", label="train_loss_ce")
    chips.nth(1).click()
    assert plots(page, "plot.data.filter((line) => line.visible).map((line) => line.y[0])")[-1] == [10]


def test_precision_recall_is_chosen_by_class_and_iou(show, report, runs):
    page = show(report)
    plot = page.locator("#precision-recall .plot")
    lines = "plot => plot.data.filter((line) => line.meta !== undefined).map((line) => line.y)"
    whole = plot.evaluate(lines)
    assert len(whole) == 3
    table = read_checkpoint(runs[0] / "eval" / "latest.pth")["precision"][0, :, :, 0, -1]
    assert whole[0] == pytest.approx((100 * table.mean(1)).tolist(), abs=0.051)
    assert page.inner_text("#precision-recall .areas").split()[1] == percent(stats(runs[0])[1])
    page.select_option("#pr-iou", "0.75")
    assert page.inner_text("#precision-recall .areas").split()[1] == percent(stats(runs[0])[2])
    page.select_option("#pr-iou", "0.5")
    page.select_option("#pr-class", "2")
    assert plot.evaluate(lines)[0] == pytest.approx((100 * table[:, 1]).tolist(), abs=0.051)


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
    assert words and all(CATEGORIES[17] in word for word in words if "near" in word or "is " in word or "missed" in word)
    href = "images => images.map((image) => image.getAttribute('href'))"
    sources = page.locator(".shot image").evaluate_all(href)
    assert len(sources) == len(words) and all(source.startswith("data:image/jpeg;base64,") for source in sources)
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


def test_charts_follow_the_theme(show, report):
    page = show(report)

    def colours():
        values = [page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{name}')")
                  for name in ("--run-1", "--muted", "--paper")]  # fmt: skip
        assert plots(page, "[plot.data.at(-1).line.color, plot.layout.font.color]") == [values[:2]] * 9
        return values

    light = colours()
    page.click("#theme")
    dark = colours()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.click("#theme")
    assert colours() == light


def test_a_chart_is_saved_as_a_picture(show, report, tmp_path):
    page = show(report)
    with page.expect_download() as download:
        page.locator("#curves .plot").first.get_by_label("Download").press("Enter")
    download.value.save_as(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_charts_fit_on_paper_and_back_on_the_screen(show, report):
    page = show(report, scheme="dark")
    width = "plot.getElementsByClassName('main-svg')[0].getAttribute('width')"
    before = plots(page, width)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(plots(page, width)) == {"310"}
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    playwright.expect(page.locator("#curves .main-svg").last).to_have_attribute("width", before[-1])
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


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
        plot = page.locator(f"{section} .plot").first
        plot.locator(".nsewdrag").hover()
        playwright.expect(plot.locator(".hoverlayer")).to_contain_text(read)
    assert "dog" not in texts(page, "b") and page.locator("main img, .plot b, .plot i").count() == 0


def test_flags_are_folded_and_filtered(show, report):
    page = show(report)
    assert not page.locator("#all-flags table").is_visible()
    page.click("#all-flags summary")
    names = [row[0] for row in rows(page, "#all-flags")]
    assert {"--bf", "--insert_idx"} <= set(names[:3]) and len(names) > 60, "those that differ first"
    page.fill("#flag-filter", "learning rate")
    assert "--lr" in [row[0] for row in rows(page, "#all-flags")] and len(rows(page, "#all-flags")) < 10


def test_runs_that_have_only_begun(show, runs, tmp_path):
    for name, kept in (("begun", ["run.json"]), ("young", ["log.txt"])):
        (tmp_path / name).mkdir()
        for file in kept:
            shutil.copy(runs[0] / file, tmp_path / name)
    (tmp_path / "young" / "log.txt").write_text(json.dumps({k: v for k, v in log_row(0).items() if "test" not in k}) + '\n{"epo')
    make_page([tmp_path / "begun", tmp_path / "young"], tmp_path / "report.html")
    page = show(tmp_path / "report.html")
    assert any(note.startswith("begun: has no log.txt yet") for note in texts(page, ".notes li"))
    assert all(page.locator(f"#{name} .note").count() for name in ("figures", "classes", "mistakes"))
    assert min(shown_lines(page)) == 1


def test_eighty_classes_and_twenty_runs(show, tmp_path):
    annotations = write_data(tmp_path / "coco", images=60, categories={i: f"class number {i}" for i in range(1, 81)})
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
