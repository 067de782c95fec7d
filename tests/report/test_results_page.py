"""RESULTS.md: the stored results and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import DATA, arm, lane, results

from cnnlib.cli.finished import asked
from cnnlib.cli.main import main
from cnnlib.config.fields import from_dict
from cnnlib.config.schema import EXPERIMENTS, Experiment, Growth, kept_like
from cnnlib.report import results_page
from cnnlib.report.results_page import by_seed, dsd_exponents, sample_sizes
from cnnlib.system.files import read_json

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STORED = sorted(path.parent.name for path in DOCS.glob("*/results.json") if "arms" in read_json(path))


def test_the_page_is_what_the_stored_results_say():
    runs, figures = results_page.stored(DOCS), read_json(DOCS / "published.json")
    assert (DOCS / "RESULTS.md").read_text() == results_page.page(runs, asked, figures)


@pytest.mark.parametrize("name", STORED)
def test_each_stored_run_is_in_the_page_with_its_own_numbers(name):
    results = read_json(DOCS / name / "results.json")
    text = (DOCS / "RESULTS.md").read_text()
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert asked(results["experiment"]).question in section
    assert not results["commit"].endswith("-dirty") and results["commit"][:12] in section
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", section)
    assert (DOCS / picture).is_file()
    if len(results["arms"]) <= results_page.MOST_ROWS:
        for arm in results["arms"]:
            accuracies = [100 * lane["test_accuracy"] for lane in arm["lanes"] if lane["status"] == "ok"]
            if len(arm["settings"]) == 1:
                assert re.search(
                    rf"^\| {re.escape(arm['name'])} \|.* {np.mean(accuracies):.2f} \[", section, re.MULTILINE
                )


def test_every_experiment_that_trains_is_stored_or_missing_for_a_reason():
    trained = {name for name in EXPERIMENTS if not isinstance(EXPERIMENTS.get(name), Growth)}
    missing = trained - {read_json(DOCS / name / "results.json")["experiment"] for name in STORED}
    for name in missing:  # such as one that needs a download
        assert "was not run" in (DOCS / name / "note.md").read_text()


@pytest.mark.parametrize("name", STORED)
def test_the_stored_configuration_is_a_registered_experiment_s(name):
    results = read_json(DOCS / name / "results.json")
    if name == results["experiment"]:
        registered = EXPERIMENTS.get(name)
        assert kept_like(from_dict(results["config"], Experiment), registered) == registered


def sweep(exponents):
    """Results in which the size that reaches 90 % is `4 k^p d^q`, exactly."""
    arms = []
    for reading, (p, q) in exponents.items():
        for k, d in ((2, 4), (4, 4), (8, 4), (4, 8), (4, 16)):
            for size in (2.0**e for e in range(1, 16)):
                accuracy = min(1.0, max(0.5, 0.9 + 0.1 * np.log2(size / (4 * k**p * d**q))))
                lanes = [lane(seed, accuracy) for seed in (0, 1)]
                arms.append(arm(f"{reading}_k{k}_d{d}_{int(size)}", lanes, data=replace(DATA, train=int(size))))
    return results(*arms)


def some_of(found, is_wanted):
    """The results of the arms that are wanted."""
    return replace(found, arms=tuple(filter(is_wanted, found.arms)))


def test_exponents_are_found_again():
    text = dsd_exponents(sweep({"conv": (1.0, 0.5), "full": (2.0, 1.0)}), level=0.9)
    assert "| conv | k + d | 1.00 [1.00, 1.00] | 0.50 [0.50, 0.50] | 10 of 10 |" in text
    assert "| full | k^2 d | 2.00 [2.00, 2.00] | 1.00 [1.00, 1.00] | 10 of 10 |" in text
    assert "| conv | 4 | 4 | 32 [32, 32] |" in text


def test_sizes_outside_those_that_were_tried_are_counted_and_not_fitted():
    found = sweep({"conv": (1.0, 1.0)})
    found = some_of(found, lambda arm: 32 <= arm.data.train <= 128)  # 32 to 256 are needed
    text = dsd_exponents(found, level=0.9)
    assert "| conv | k + d | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 6 of 10 |" in text
    assert "| conv | 2 | 4 | 2 of 2 seeds with 32 or fewer |" in text and "| conv | 4 | 4 | 64 [64, 64] |" in text
    assert "| conv | 4 | 16 | not reached by 2 of 2 seeds |" in text
    found = some_of(found, lambda arm: arm.data.train <= 64)
    assert "| conv | k + d | not to be told | not to be told | 2 of 10 |" in dsd_exponents(found, level=0.9)


def test_sizes_that_reach_a_level_are_told_and_those_that_do_not():
    found = some_of(sweep({"conv": (1.0, 0.0)}), lambda arm: "_k2_d4_" in arm.name)
    few = replace(found, arms=tuple(replace(arm, name=arm.name.replace("_k2_d4", "")) for arm in found.arms))
    assert [len(curves) for curves in by_seed(few).values()] == [2]
    assert "| conv | 6 [6, 6] | 8 [8, 8] |" in sample_sizes(few)  # log2(n / 8) is -1/2 at 85 %
    first, *others = some_of(few, lambda arm: arm.data.train <= 8).arms
    worse = (replace(first.lanes[0], test_accuracy=0.5), *first.lanes[1:])
    low = replace(few, arms=(replace(first, lanes=worse), *others))
    assert "not reached by" in sample_sizes(low)


def test_a_run_without_words_or_figures_to_compare_is_refused(tmp_path, capsys):
    assert main(["results", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["results", str(tmp_path)]) == 2
    assert "published.json" in capsys.readouterr().err
    (tmp_path / "published.json").write_text("{}")
    (tmp_path / "fc_vs_conv").mkdir()
    (tmp_path / "fc_vs_conv" / "results.json").write_text((DOCS / "fc_vs_conv" / "results.json").read_text())
    assert main(["results", str(tmp_path)]) == 2
    assert "note.md" in capsys.readouterr().err
