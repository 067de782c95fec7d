"""Arms compared seed by seed, from what a run's results hold."""

from __future__ import annotations

import made_results
import numpy as np
import pytest
from made_results import lane, results
from scipy import stats

from cnnlib.report.comparisons import MOST_ARMS, accuracies, differences, spread_sentence, spreads

pytestmark = pytest.mark.once


def arm(name, values, rates=(0.1,), **change):
    """An arm whose lanes have the values, by learning rate and seed; None for one that diverged."""
    lanes = [
        lane(seed, value, learning_rate=rate)
        for rate, row in zip(rates, values, strict=True)
        for seed, value in enumerate(row)
    ]
    return made_results.arm(name, lanes, **change)


FIRST, SECOND = [0.91, 0.93, 0.90, 0.94], [0.90, 0.90, 0.89, 0.92]


def test_the_chosen_setting_s_lanes_that_have_not_diverged_count():
    first = arm("a", [[0.5, 0.5], [0.7, None]], rates=(0.1, 0.2), chosen_setting=1)
    assert accuracies(results(first, arm("b", [[0.6, 0.8]]))) == {"a": {(0, 0): 0.7}, "b": {(0, 0): 0.6, (1, 1): 0.8}}
    unchosen = results(arm("a", [[0.5], [0.7]], rates=(0.1, 0.2), chosen_setting=None), arm("b", [[0.6]]))
    assert accuracies(unchosen) == {"b": {(0, 0): 0.6}} and differences(unchosen) == []


def test_differences_are_those_of_the_paired_t_test():
    (found,) = differences(results(arm("a", [FIRST]), arm("b", [SECOND])))
    expected = stats.ttest_rel(FIRST, SECOND)
    assert (found.first, found.second, found.n) == ("a", "b", 4)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.verdict == "first ahead"


def test_few_arms_are_compared_each_with_each_and_many_with_the_first():
    few = [arm(str(number), [FIRST]) for number in range(MOST_ARMS)]
    assert len(differences(results(*few))) == MOST_ARMS * (MOST_ARMS - 1) // 2
    many = [*few, arm("more", [SECOND])]
    assert {found.second for found in differences(results(*many))} == {"0"}
    assert len(differences(results(*many))) == MOST_ARMS


def test_crossed_seeds_split_the_spread():
    """Accuracies that are a sum of what the weights and what the order contribute leave nothing for the rest."""
    seeds = [divmod(number, 3) for number in range(6)]
    lanes = [lane(seed, 0.9 + 0.02 * seed + 0.001 * order, order_seed=order) for seed, order in seeds]
    crossed = made_results.arm("a", lanes)
    (found,) = spreads(results(crossed, arm("b", [FIRST]))).values()  # b's seeds are not crossed
    assert found.initialisation.estimate == pytest.approx(np.var([0.0, 0.02], ddof=1))
    assert found.order.estimate == pytest.approx(np.var([0.0, 0.001, 0.002], ddof=1))
    assert found.rest.estimate == pytest.approx(0.0, abs=1e-12)
    text = spread_sentence("a", found)
    assert "2 initialisations by 3 orders" in text and "initial weights 1.41 [" in text and "data order 0.10 [" in text
    incomplete = made_results.arm("a", [*lanes[:4], lanes[5]])  # one combination is missing
    assert spreads(results(incomplete)) == {}


def test_planned_pairs_are_compared_those_of_the_caller_before_those_of_the_run():
    run = results(*(arm(name, [FIRST]) for name in "abcd"), config={"comparisons": ["a:b", "c:gone"]})
    assert [(found.first, found.second) for found in differences(run)] == [("a", "b")]
    planned = differences(run, ("c:d", "d:a"))
    assert [(found.first, found.second, found.comparisons) for found in planned] == [("c", "d", 2), ("d", "a", 2)]
