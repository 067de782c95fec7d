"""The report: what it says is what the results say, it loads nothing, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cnnlib import charts
from cnnlib.config import Arm, Checkpoint, Data, Experiment, Lanes, Optim
from cnnlib.errors import UserError
from cnnlib.page import drawing, write_report
from cnnlib.run import run
from cnnlib.spec import parse_model
from cnnlib.watcher import Watcher
from experiments.__main__ import main

EXPERIMENT = Experiment(
    arms=(
        Arm("full", parse_model("avg:7 dense:classes")),
        Arm("conv", parse_model("avg:4 conv:4@3 relu dense:classes")),
    ),
    data=Data("lines", validation=200),
    optim=Optim(learning_rate=(0.05,)),
    lanes=Lanes(seed=(3, 5, 7)),
    epochs=2,
    batch_size=200,
    compile_cache=False,
    checkpoint=Checkpoint(every=0),
)


class Cells(HTMLParser):
    """Rows of the first table, and what the page would load."""

    def __init__(self):
        super().__init__()
        self.rows, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loads += [value for name, value in attributes if name in ("src", "href") and value]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.tags[-1][0] in ("td", "th", "button"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = run(EXPERIMENT, "tiny <b>", folder / "one", Watcher())
    (folder / "two").mkdir()
    for name in ("results.json", "metrics.jsonl"):
        shutil.copy(folder / "one" / name, folder / "two" / name)
    write_report([folder / "one", folder / "two"], folder / "report.html", lambda name: None)
    return results, folder, (folder / "report.html").read_text()


def test_the_table_has_the_numbers_of_the_lanes(report):
    results, _, text = report
    cells = Cells()
    cells.feed(text)
    rows = {row[0]: row[1:] for row in cells.rows if row}
    for arm in results["arms"]:
        accuracies = [100 * lane["test_accuracy"] for lane in arm["lanes"]]
        known = [100 * lane["train_accuracy"] for lane in arm["lanes"]]
        row = rows[arm["name"]]
        assert row[0] == arm["connectivity"] and row[1] == f"{arm['parameters']:,}"
        assert row[4:6] == [f"{np.mean(known):.2f}", f"{np.mean(accuracies):.2f}"]
        assert row[7] == "3"
    best = max(results["arms"], key=lambda arm: arm["test_accuracy"]["mean"])
    mean = f"{100 * best['test_accuracy']['mean']:.2f}"
    assert f"Of 2 arms on lines, {best['name']} has the highest mean test accuracy: {mean}" in text


def test_the_plots_have_every_lane_and_every_epoch(report):
    results, _, text = report
    specs = {
        name: json.loads(spec)
        for name, spec in re.findall(r'<script type="application/json" id="(run-0-\w+)">(.*?)</script>', text)
    }
    assert set(specs) == {f"run-0-{name}" for name in (*charts.COSTS, "train_accuracy", "validation_accuracy")}

    def points(spec):
        named = spec.get("datasets", {})
        parts = [layer.get("data", spec.get("data", {})) for layer in spec["layer"]]
        return [value for part in parts for value in part.get("values", named.get(part.get("name"), []))]

    lanes = {(p["arm"], p["seed"], round(p["accuracy"], 6)) for p in points(specs["run-0-parameters"]) if "seed" in p}
    assert lanes == {
        (arm["name"], lane["seed"], round(100 * lane["test_accuracy"], 6))
        for arm in results["arms"]
        for lane in arm["lanes"]
    }
    curve = [p for p in points(specs["run-0-validation_accuracy"]) if "seed" in p]
    assert {(p["arm"], p["epoch"], p["seed"]) for p in curve} == {
        (arm, epoch, seed) for arm in ("full", "conv") for epoch in (1, 2) for seed in (3, 5, 7)
    }


def test_confusions_and_mistakes_are_those_of_the_answers(report):
    _, folder, text = report
    with np.load(folder / "one" / "predictions" / "conv.npz") as found:
        labels, predicted, worst = found["labels"], found["predicted"], found["worst"]
    share = np.mean([(lane[labels == 1] == 1).mean() for lane in predicted])
    (matrix,) = re.findall(r"<caption>conv: percent of a true class.*?</table>", text)[:1]
    assert f">{100 * share:.1f}</td>" in matrix
    assert all(f"Test example {index}:" in text for index in worst)
    assert "This run keeps no predictions" in text  # the second one was copied without them


def test_nothing_of_a_run_is_markup_and_nothing_is_loaded(report):
    _, folder, text = report
    assert "tiny <b>" not in text and "tiny &lt;b&gt;" in text
    cells = Cells()
    cells.feed(text)
    assert all(place.startswith(("#", "data:image/png;base64,")) for place in cells.loads)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
    assert len(text.encode()) < 5e6
    results = json.loads((folder / "one" / "results.json").read_text())
    results["arms"][0]["name"] = "</script><script>alert(1)</script>"
    results["config"]["arms"][0]["name"] = "fine"
    (folder / "three").mkdir(exist_ok=True)
    (folder / "three" / "results.json").write_text(json.dumps(results))
    write_report([folder / "three"], folder / "three.html", lambda name: None)
    assert "<script>alert" not in (folder / "three.html").read_text()


def test_headings_sort_and_plots_have_words(report):
    cells = Cells()
    cells.feed(report[2])
    tags = [tag for tag, _ in cells.tags]
    assert {"main", "nav", "header", "footer"} <= set(tags) and (
        "html",
        {"lang": "en", "data-theme": "light"},
    ) in cells.tags
    assert all(attributes.get("aria-label") for tag, attributes in cells.tags if attributes.get("class") == "plot")
    assert all(attributes.get("alt") for tag, attributes in cells.tags if tag == "img")


@pytest.mark.parametrize("what", ["empty", "junk", "fields"])
def test_a_folder_without_whole_results_is_one_line(report, tmp_path, what, capsys):
    if what == "junk":
        (tmp_path / "results.json").write_text('{"arms": []}')
    if what == "fields":
        results = json.loads((report[1] / "one" / "results.json").read_text())
        del results["arms"][0]["settings"]
        (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_the_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[report\]'"):
        write_report([tmp_path], tmp_path / "page.html", lambda name: None)


def test_signals_and_colours_are_drawn():
    assert drawing(np.linspace(0, 1, 40, dtype=np.float32)[:, None], "a ramp").count("<polyline") == 1
    assert 'alt="a &quot;photo&quot;"' in drawing(np.zeros((4, 4, 3), np.uint8), 'a "photo"')


def test_a_run_in_which_every_lane_diverged_is_told(tmp_path):
    wild = replace(EXPERIMENT, optim=Optim(learning_rate=(1e8,)), arms=EXPERIMENT.arms[1:], epochs=1)
    run(wild, "wild", tmp_path / "run", Watcher())
    write_report([tmp_path / "run"], tmp_path / "page.html", lambda name: None)
    assert "No arm has a test accuracy" in (tmp_path / "page.html").read_text()


def chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine")
def test_a_browser_shows_it_without_errors_or_requests(report, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        colours = {}
        for scheme, width in (("light", 1100), ("dark", 1100), ("light", 390)):
            page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
            told, asked = [], []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("pageerror", lambda error, told=told: told.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((report[1] / "report.html").as_uri())
            count = page.locator(".plot").count()
            page.wait_for_function(f"document.querySelectorAll('.plot[data-drawn]').length === {count}", timeout=60_000)
            assert told == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
            colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            if width == 1100:
                looks_right(page, scheme, tmp_path)
        assert colours["light"] != colours["dark"]
        browser.close()


def looks_right(page, scheme, folder):
    """Sorting by click and by keyboard, a tooltip with the seed, the theme's button, and pixels of every colour."""
    names = lambda: page.locator("main table tbody").first.locator("th").all_text_contents()  # noqa: E731
    heading = page.locator("thead th").nth(2)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending" and names() == ["full", "conv"]
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending" and names() == ["conv", "full"]
    page.locator(".plot").first.locator("path[aria-label*='seed: 5'], g.mark-symbol path").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "arm" in page.locator("#vg-tooltip-element").inner_text()
    assert page.locator(".plot").first.locator("path[aria-label*='seed']").count() >= 6
    path = folder / f"{scheme}.png"
    page.locator(".plot").first.screenshot(path=path)
    from PIL import Image

    pixels = np.asarray(Image.open(Path(path)).convert("RGB"), int)
    for connectivity in ("full", "conv"):
        colour = charts.STYLE[connectivity][0]
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(axis=-1) < 12).sum() > 20, (scheme, connectivity)
    before = page.evaluate("document.documentElement.dataset.theme")
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") != before
    page.locator("#theme").click()
