"""Arms compared seed by seed, from what a run's results hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cnnlib.config.schema import SETTING_FIELDS
from cnnlib.report.comparisons import MOST_ARMS, accuracies, differences, spread_sentence, spreads

pytestmark = pytest.mark.once

SETTING = dict.fromkeys(SETTING_FIELDS, 0.0)


def arm(name, values, rates=(0.1,), chosen=0):
    """An arm whose lanes have the values, by setting and seed; NaN for one that diverged."""
    settings = [{**SETTING, "learning_rate": rate} for rate in rates]
    lanes = [
        {
            **setting,
            "seed": seed,
            "order_seed": seed,
            "test_accuracy": value,
            "status": "diverged" if np.isnan(value) else "ok",
        }
        for setting, row in zip(settings, values, strict=True)
        for seed, value in enumerate(row)
    ]
    return {"name": name, "chosen_setting": chosen, "settings": settings, "lanes": lanes}


FIRST, SECOND = [0.91, 0.93, 0.90, 0.94], [0.90, 0.90, 0.89, 0.92]


def test_the_chosen_setting_s_lanes_that_have_not_diverged_count():
    results = {"arms": [arm("a", [[0.5, 0.5], [0.7, np.nan]], rates=(0.1, 0.2), chosen=1), arm("b", [[0.6, 0.8]])]}
    assert accuracies(results) == {"a": {(0, 0): 0.7}, "b": {(0, 0): 0.6, (1, 1): 0.8}}
    unchosen = {"arms": [arm("a", [[0.5], [0.7]], rates=(0.1, 0.2), chosen=None), arm("b", [[0.6]])]}
    assert accuracies(unchosen) == {"b": {(0, 0): 0.6}} and differences(unchosen) == []


def test_differences_are_those_of_the_paired_t_test():
    (found,) = differences({"arms": [arm("a", [FIRST]), arm("b", [SECOND])]})
    expected = stats.ttest_rel(FIRST, SECOND)
    assert (found.first, found.second, found.n) == ("a", "b", 4)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.verdict == "first ahead"


def test_few_arms_are_compared_each_with_each_and_many_with_the_first():
    few = [arm(str(number), [FIRST]) for number in range(MOST_ARMS)]
    assert len(differences({"arms": few})) == MOST_ARMS * (MOST_ARMS - 1) // 2
    many = [*few, arm("more", [SECOND])]
    assert {found.second for found in differences({"arms": many})} == {"0"}
    assert len(differences({"arms": many})) == MOST_ARMS


def test_crossed_seeds_split_the_spread():
    """Accuracies that are a sum of what the weights and what the order contribute leave nothing for the rest."""
    crossed = arm("a", [[0.0] * 6])
    for number, lane in enumerate(crossed["lanes"]):
        lane["seed"], lane["order_seed"] = divmod(number, 3)
        lane["test_accuracy"] = 0.9 + 0.02 * lane["seed"] + 0.001 * lane["order_seed"]
    (found,) = spreads({"arms": [crossed, arm("b", [FIRST])]}).values()  # b's seeds are not crossed
    assert found.initialisation.estimate == pytest.approx(np.var([0.0, 0.02], ddof=1))
    assert found.order.estimate == pytest.approx(np.var([0.0, 0.001, 0.002], ddof=1))
    assert found.rest.estimate == pytest.approx(0.0, abs=1e-12)
    text = spread_sentence("a", found)
    assert "2 initialisations by 3 orders" in text and "initial weights 1.41 [" in text and "data order 0.10 [" in text
    del crossed["lanes"][4]  # incomplete: nothing is said
    assert spreads({"arms": [crossed]}) == {}


def test_planned_pairs_are_compared_those_of_the_caller_before_those_of_the_run():
    results = {"arms": [arm(name, [FIRST]) for name in "abcd"], "config": {"comparisons": ["a:b", "c:gone"]}}
    assert [(found.first, found.second) for found in differences(results)] == [("a", "b")]
    planned = differences(results, ("c:d", "d:a"))
    assert [(found.first, found.second, found.comparisons) for found in planned] == [("c", "d", 2), ("d", "a", 2)]
