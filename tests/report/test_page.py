"""The report: what it says is what the results say, it loads nothing, and a browser shows it."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnlib.cli.main import main
from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.errors import UserError
from cnnlib.report import charts, page
from cnnlib.report.labels import raised
from cnnlib.report.mistakes import lines, png
from cnnlib.report.page import write_report
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.predictions import read_answers
from cnnlib.runs.runner import run
from cnnlib.spec.notation import parse_model

pytestmark = pytest.mark.once

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


def rows_of(text, label):
    """The texts of the rows of the tables that have this caption."""
    cells = Cells()
    for table in re.findall(rf'<table><caption class="unseen">{label}</caption>.*?</table>', text, re.DOTALL):
        cells.feed(table)
    return [[cell.strip() for cell in row] for row in cells.rows if row]


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
    rows = {row[0]: row[1:] for row in rows_of(text, "Arms, with counts and accuracies")}
    for arm in results.arms:
        accuracies = [100 * lane.test_accuracy for lane in arm.lanes]
        known = [100 * lane.train_accuracy for lane in arm.lanes]
        row = rows[arm.name]
        assert row[0] == arm.connectivity and row[1] == f"{arm.parameters:,}"
        assert row[4] == f"{np.mean(known):.2f}" and row[5].startswith(f"{np.mean(accuracies):.2f} [")
        assert row[6] == "3"
    best = max(results.arms, key=lambda arm: arm.test_accuracy.mean)
    mean = f"{100 * best.test_accuracy.mean:.2f}"
    assert f"Of 2 arms on lines, {best.name} has the highest mean test accuracy: {mean}" in text


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
        (arm.name, lane.seed, round(100 * lane.test_accuracy, 6)) for arm in results.arms for lane in arm.lanes
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
    (matrix,) = re.findall(r"<caption>conv: percent of a true class.*?</table>", text, re.DOTALL)[:1]
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
    results["experiment"] = "</script><script>alert(1)</script>"
    results["config"]["arms"][0]["name"] = "fine"
    (folder / "three").mkdir(exist_ok=True)
    (folder / "three" / "results.json").write_text(json.dumps(results))
    write_report([folder / "three"], folder / "three.html", lambda name: None)
    assert "<script>alert" not in (folder / "three.html").read_text()


def test_headings_sort_and_plots_have_words(report):
    cells = Cells()
    cells.feed(report[2])
    tags = [tag for tag, _ in cells.tags]
    assert {"main", "nav", "header", "footer"} <= set(tags) and ("html", {"lang": "en"}) in cells.tags
    assert all(attributes.get("aria-label") for tag, attributes in cells.tags if attributes.get("class") == "plot")
    assert all(attributes.get("alt") for tag, attributes in cells.tags if tag == "img")


def test_every_lane_and_every_mean_of_a_curve_is_in_a_table_too(report):
    results, folder, text = report
    wanted = [
        [arm.name, str(lane.seed)]
        + [f"{100 * getattr(lane, f'{part}_accuracy'):.2f}" for part in ("train", "validation", "test")]
        + [lane.status]
        for arm in results.arms
        for lane in arm.lanes
    ]
    assert rows_of(text, "Lanes")[1 : 1 + len(wanted)] == wanted
    lines = [json.loads(line) for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    for part, words in (("train", "Training"), ("validation", "Validation")):
        head, *rows = rows_of(text, f"{words} accuracy by epoch, %, as a table")[:3]
        assert head == ["epoch", "full", "conv"]
        for row, epoch in zip(rows, (1, 2), strict=True):
            found = [[x for x in lines if (x["arm"], x["epoch"]) == (arm, epoch)] for arm in ("full", "conv")]
            means = [100 * np.mean([line[f"{part}_accuracy"] for line in arm]) for arm in found]
            assert [float(cell) for cell in row] == pytest.approx([epoch, *means], abs=0.0051)


def altered(report, place, change):
    """A copy of the run whose results are changed."""
    shutil.copytree(report[1] / "one", place)
    results = json.loads((place / "results.json").read_text())
    change(results)
    (place / "results.json").write_text(json.dumps(results))
    write_report([place], place / "page.html", lambda name: None)
    return (place / "page.html").read_text()


def test_classes_have_their_names_where_the_data_have_some(report, tmp_path):
    names = [f"<i>{number}" for number in range(10)]
    text = altered(report, tmp_path / "run", lambda results: results["data"].update(class_names=names))
    assert '<th scope="row">&lt;i&gt;0</th>' in text and "<i>" not in text
    assert '<th scope="row">vertical</th>' in report[2]
    text = altered(report, tmp_path / "other", lambda results: results["data"].pop("class_names"))
    assert '<th scope="row">0</th>' in text


def test_a_configuration_of_another_version_is_shown_as_it_stands(report, tmp_path):
    text = altered(report, tmp_path / "run", lambda results: results["config"].update(colour="green"))
    assert "not known to this version of cnnlib: no field config.colour" in text
    assert '"colour": "green"' in html.unescape(text)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a" + "/.." * 9 + "/etc/passwd"])
def test_arms_that_are_no_names_of_files_are_one_line(report, tmp_path, name):
    with pytest.raises(UserError):
        altered(report, tmp_path / "run", lambda results: results["arms"][0].update(name=name))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**400, "0.5", None, [], {}], ids=lambda value: str(value)[:9]
)
@pytest.mark.parametrize("arms", [1, 2])
def test_accuracies_that_are_no_numbers_are_one_line(report, tmp_path, value, arms):
    def change(results):
        results["arms"][0]["lanes"][0]["test_accuracy"] = value
        del results["arms"][arms:]  # one alone is compared with none, so that nothing but the page looks at it

    with pytest.raises(UserError):
        altered(report, tmp_path / "run", change)


def test_damaged_answers_are_one_line(report, tmp_path):
    shutil.copytree(report[1] / "one", tmp_path / "run")
    path = tmp_path / "run" / "predictions" / "conv.npz"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(UserError):  # a changed date, say, does no harm; anything else must not come out
            read_answers(tmp_path / "run", "conv")
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }"
    member = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", member)
    with pytest.raises(UserError, match="holds no answers"):
        read_answers(tmp_path / "run", "conv")


@pytest.mark.slow
def test_a_page_stays_below_its_limit_and_says_what_it_leaves_out(report, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "library", lambda: "")
    out = tmp_path / "page.html"
    sizes = []
    for detail in page.DETAILS:
        read = page.read_run(report[1] / "one", "one")
        sizes.append(len(page.page([read], lambda name: None, detail).encode()))
    assert sizes == sorted(sizes, reverse=True)
    for limit in (sizes[0], sizes[0] - 1, sizes[-1]):
        monkeypatch.setattr(page, "MOST_BYTES", limit)
        write_report([report[1] / "one"], out, lambda name: None)
        assert out.stat().st_size <= limit
        assert ("To keep the page below 5 MB" in out.read_text()) == (limit < sizes[0])
    assert "without single lanes, and no mistakes per arm" in out.read_text()
    out.unlink()
    monkeypatch.setattr(page, "MOST_BYTES", sizes[-1] - 1)
    with pytest.raises(UserError, match="report fewer runs"):
        write_report([report[1] / "one"], out, lambda name: None)
    assert not out.exists()


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


def test_names_of_means_that_lie_together_are_raised():
    means = [
        {"arm": name, "cost": cost, "accuracy": accuracy}
        for name, cost, accuracy in (
            ("far", 1.0, 50.0),
            ("near", 100.0, 90.0),
            ("nearer", 110.0, 90.1),
            ("x", 120.0, 90.0),
        )
    ]
    labels = charts.labels_of(means)
    rises = raised(labels)
    assert rises[0] == 0 and min(rises[1:]) == 0
    bottoms = sorted(label.bottom + rise for label, rise in zip(labels[1:], rises[1:], strict=True))
    assert min(np.diff(bottoms)) >= labels[0].height
    assert raised([]) == [] and raised(labels[:1]) == [0]


def test_the_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[report\]'"):
        write_report([tmp_path], tmp_path / "page.html", lambda name: None)


def test_signals_and_colours_are_drawn():
    (long,) = lines(np.linspace(0, 1, 4000, dtype=np.float32)[:, None])
    assert long.startswith("1.0,59.0 ") and long.endswith(" 59.0,1.0")  # from the lower left to the upper right
    assert len(lines(np.zeros((40, 2), np.float32))) == 2
    image = Image.open(io.BytesIO(base64.b64decode(png(np.full((4, 5, 3), 7, np.uint8)))))
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((5, 4), "RGB", (7, 7, 7))


@pytest.mark.slow
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
            tab = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
            told, asked = [], []
            tab.on("console", lambda message, told=told: told.append(message.text))
            tab.on("pageerror", lambda error, told=told: told.append(str(error)))
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto((report[1] / "report.html").as_uri())
            count = tab.locator(".plot").count()
            tab.wait_for_function(f"document.querySelectorAll('.plot[data-drawn]').length === {count}", timeout=60_000)
            assert told == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
            colours[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            if width == 1100:
                looks_right(tab, scheme, tmp_path)
        assert colours["light"] != colours["dark"]
        browser.close()


def looks_right(tab, scheme, folder):
    """Sorting by click and by keyboard, a tooltip with the seed, the theme's button, and pixels of every colour."""
    names = lambda: tab.locator("main table tbody").first.locator("th").all_text_contents()  # noqa: E731
    heading = tab.locator("thead th").nth(2)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending" and names() == ["full", "conv"]
    heading.locator("button").focus()
    tab.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending" and names() == ["conv", "full"]
    for arm in ("full", "conv"):
        for seed in (3, 5, 7):  # each by itself: none is covered by the mean or by another
            tab.locator(".plot").first.locator(f"path[aria-label*='arm: {arm}'][aria-label$='seed: {seed}']").hover()
            words = rf"arm\s+{arm}\s.*\sseed\s+{seed}\s"
            tab.wait_for_function(
                f"new RegExp({json.dumps(words)}, 's').test(document.querySelector('.vg-tooltip.visible')?.innerText)",
                timeout=60_000,
            )
    # What is not known stays below, whichever way the others are sorted.
    tab.evaluate("document.querySelector('main tbody tr td:nth-child(6)').dataset.value = ''")  # conv's, now the first
    for _ in range(2):
        tab.locator("thead th").nth(5).locator("button").click()
        assert names() == ["full", "conv"]
    wide = "[...document.querySelectorAll('.wide')].filter((e) => e.scrollWidth > e.clientWidth).length"
    assert tab.evaluate(wide) == 0  # the whole table is seen
    assert tab.locator(".plot").first.locator("path[aria-label*='seed']").count() >= 6
    path = folder / f"{scheme}.png"
    tab.locator(".plot").first.screenshot(path=path)
    from PIL import Image

    pixels = np.asarray(Image.open(Path(path)).convert("RGB"), int)
    for connectivity in ("full", "conv"):
        colour = charts.STYLE[connectivity][0]
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(axis=-1) < 12).sum() > 20, (scheme, connectivity)
    before = tab.evaluate("document.documentElement.dataset.theme")
    tab.locator("#theme").click()
    assert tab.evaluate("document.documentElement.dataset.theme") != before
    tab.locator("#theme").click()
