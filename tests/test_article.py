"""The statements of the textbook: each has a function and a test; those about trained nets hold in stored results."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import cnnlib
from cnnlib.report.comparisons import differences
from cnnlib.runs.results import read_results

pytestmark = pytest.mark.once

ROOT = Path(cnnlib.__file__).parents[1]
TABLE = (ROOT / "notebooks" / "README.md").read_text().split("| statement | function | test | notebook |\n")[1]
ROWS = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in TABLE.split("\n\n")[0].splitlines()[1:]]


def test_there_are_statements_and_none_stands_twice():
    assert (
        len(ROWS) >= 29
        and {len(row) for row in ROWS} == {4}
        and len({statement for statement, *_ in ROWS}) == len(ROWS)
    )


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_a_statement_has_a_function_a_test_and_a_notebook(row):
    _, function, test, notebook = row
    module, name = function.strip("`").rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))
    file, _, test_name = test.strip("`").partition("::")
    assert re.search(rf"^def {test_name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), test
    assert (ROOT / "notebooks" / f"{notebook}.py").exists()


def stored(name):
    return read_results(ROOT / "docs" / name)


def ahead(name):
    """Of each two arms that were compared, in either order: the one that is ahead, None where it is undecided."""
    found = {}
    for each in differences(stored(name)):
        assert each.n >= 5
        winner = {"first ahead": each.first, "second ahead": each.second, "undecided": None}[each.verdict]
        found[each.first, each.second] = found[each.second, each.first] = winner
    return found


def test_a_convolution_is_ahead_with_fewer_parameters():
    arms = {arm.name: arm.parameters for arm in stored("fc_vs_conv").arms}
    assert arms["lenet5"] < arms["mlp_75_33"] < arms["lenet_300_100"]
    found = ahead("fc_vs_conv")
    assert found["lenet5", "lenet_300_100"] == found["lenet5", "mlp_75_33"] == "lenet5"


def test_locality_and_sharing_are_each_worth_something():
    """Beyond doubt on colour images at equal multiply-adds; on digits the second is not settled by five seeds."""
    results = stored("sharing_and_locality_cifar10_jpeg")
    arms = {arm.name: arm.test_accuracy.ci95 for arm in results.arms}
    conv, local, full = (arms[name] for name in ("conv_macs", "local_macs", "full_sixth"))
    assert full[1] < local[0] and local[1] < conv[0]


def test_shuffled_pixels_take_the_advantage_of_a_convolution_only():
    found = ahead("shuffled_pixels")
    assert found["conv", "full"] == "conv" and found["full", "conv_shuffled"] == "full"
    assert found["full", "full_shuffled"] is None


def test_pooling_saves_multiply_adds_and_parameters():
    arms = {arm.name: arm for arm in stored("pooling").arms}
    for pooled in ("max", "mean"):
        assert arms["none"].macs > 3 * arms[pooled].macs
        assert arms["none"].parameters > 3 * arms[pooled].parameters


def test_pooling_narrows_the_gap_between_training_and_test():
    results = stored("pooling")
    assert {len(arm.settings) for arm in results.arms} == {1}
    gap = {
        arm.name: setting.train_accuracy - setting.test_accuracy.mean
        for arm in results.arms
        for setting in arm.settings
    }
    assert max(gap["max"], gap["mean"]) < min(gap["none"], gap["stride"])
    found = ahead("pooling")
    assert found["max", "none"] == found["max", "stride"] == "max"
    text = " ".join((ROOT / "notebooks" / "padding_and_pooling.py").read_text().replace("\n#", " ").split())
    max_gap, mean_gap, stride_gap, none_gap = (f"{100 * gap[name]:.1f}" for name in ("max", "mean", "stride", "none"))
    assert (
        f"{max_gap} points with max pooling, {mean_gap} with means, {stride_gap} with strides, {none_gap} with none"
        in text
    )
