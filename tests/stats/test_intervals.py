from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from cnnlib.errors import UserError
from cnnlib.stats.intervals import (
    detectable_difference,
    holm,
    mean_interval,
    paired_differences,
)

pytestmark = pytest.mark.once


def agrees(found, share, count):
    """Whether a share found in `count` simulations is the true one, four binomial standard deviations apart at most."""
    return abs(found - share) < 4 * np.sqrt(share * (1 - share) / count)


def arms(table, names="abcdefgh"):
    """What paired_differences takes, of a table with an arm a row and a seed a column."""
    return {name: dict(enumerate(map(float, row))) for name, row in zip(names, table, strict=False)}


# Intervals of a mean


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_interval_is_student_s(n, level):
    values = np.random.RandomState(n).normal(size=n)
    low, high = scipy_stats.t.interval(level, n - 1, values.mean(), scipy_stats.sem(values))
    interval = mean_interval(list(values), level)
    assert interval.n == n
    np.testing.assert_allclose(interval[:3], [values.mean(), low, high])


def test_one_value_has_a_mean_and_no_interval_and_none_has_neither():
    assert mean_interval([0.5]) == (0.5, None, None, 1)
    assert mean_interval([]) == (None, None, None, 0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    samples = np.random.RandomState(0).normal(size=(4000, 5))
    intervals = [mean_interval(list(sample)) for sample in samples]
    covered = np.mean([i.low <= 0.0 <= i.high for i in intervals])
    assert agrees(covered, 0.95, 4000)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, float("nan")])
def test_a_level_is_a_share(level):
    with pytest.raises(UserError, match="between 0 and 1"):
        mean_interval([0.1, 0.2], level)


# Differences


@pytest.mark.parametrize("n", [2, 5, 12])
def test_a_difference_is_the_paired_t_test(n):
    table = np.random.RandomState(n).normal(0.9, 0.01, size=(3, n))
    results = paired_differences(arms(table), level=0.9)
    assert [(r.first, r.second) for r in results] == list(combinations("abc", 2))
    for result, (first, second) in zip(results, combinations(table, 2), strict=True):
        test = scipy_stats.ttest_rel(first, second)
        np.testing.assert_allclose(result.p, test.pvalue)
        np.testing.assert_allclose((result.low, result.high), test.confidence_interval(0.9))
        wide = test.confidence_interval(1 - 0.1 / 3)
        np.testing.assert_allclose((result.simultaneous_low, result.simultaneous_high), wide)
        np.testing.assert_allclose(result.mean, np.mean(first - second))
        np.testing.assert_allclose(result.deviation, np.std(first - second, ddof=1))
        assert (result.n, result.comparisons, result.level) == (n, 3, 0.9)
    assert [r.holm for r in results] == holm([r.p for r in results])


def test_holm_s_correction_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, then 0.03 x 2 = 0.06, and 0.04 x 1, which is not less than what came before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_the_plain_p_value_and_bonferroni_s_and_keeps_the_order(p):
    corrected = holm(p)
    for value, result in zip(p, corrected, strict=True):
        assert value <= result <= min(1.0, len(p) * value)
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


def test_only_seeds_of_both_arms_are_compared():
    values = {"a": {0: 0.5, "x": 0.6, 7: 0.9}, "b": {7: 0.6, 0: 0.4, 9: 0.0}}
    (result,) = paired_differences(values)
    assert result.n == 2
    np.testing.assert_allclose(result.mean, 0.2)


def test_a_reference_is_what_all_others_are_compared_with():
    table = np.random.RandomState(0).normal(size=(4, 5))
    results = paired_differences(arms(table), reference="c")
    assert [(r.first, r.second, r.comparisons) for r in results] == [("a", "c", 3), ("b", "c", 3), ("d", "c", 3)]
    with pytest.raises(UserError, match=r"no arm 'e' .* a, b, c, d"):
        paired_differences(arms(table), reference="e")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_lane_is_no_value(value):
    with pytest.raises(UserError, match=r"b has .* for 3"):
        paired_differences({"a": {3: 0.5}, "b": {3: value}})


def test_too_few_seeds_are_undecided_and_no_comparison():
    values = {"a": {0: 0.9, 1: 0.8, 2: 0.85}, "b": {0: 0.1, 1: 0.2, 2: 0.1}, "c": {0: 0.5}, "d": {5: 0.5}}
    results = {(r.first, r.second): r for r in paired_differences(values)}
    assert {r.comparisons for r in results.values()} == {1}
    np.testing.assert_allclose(results["a", "c"].mean, 0.4)
    assert results["a", "c"][4:11] == results["c", "d"][4:11] == (None,) * 7
    assert (results["c", "d"].mean, results["c", "d"].n) == (None, 0)
    assert {pair for pair, r in results.items() if r.verdict == "undecided"} == set(results) - {("a", "b")}
    assert results["a", "b"].verdict == "first ahead"
    alone = paired_differences({"a": values["a"], "b": values["b"]})
    assert [results["a", "b"]] == alone
    assert paired_differences({"a": {0: 1.0}}) == paired_differences({}) == []


@pytest.mark.parametrize("rounded", [0.3, 0.1 + 0.2])
def test_equal_arms_are_undecided(rounded):
    by_seed = dict.fromkeys(range(10), 0.3)
    (result,) = paired_differences({"a": by_seed, "b": dict.fromkeys(by_seed, rounded)})
    assert result[3:11] == (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    assert result.verdict == "undecided"


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7])
def test_differences_that_are_all_equal_are_judged_by_their_signs(n):
    # Equal but for rounding, which t would take for certainty: 0.03 - 0.05 is not 0.29 - 0.31.
    percent = (3, 29, 17, 51, 64, 97, 8)[:n]
    first = {seed: value / 100 for seed, value in enumerate(percent)}
    second = {seed: (value + 2) / 100 for seed, value in enumerate(percent)}
    assert len({first[seed] - second[seed] for seed in range(n)}) > 1
    (result,) = paired_differences({"a": first, "b": second})
    assert result.deviation == 0
    assert result.low == result.high == result.mean == result.simultaneous_low
    np.testing.assert_allclose(result.mean, -0.02)
    assert result.p == scipy_stats.binomtest(n, n).pvalue
    assert result.verdict == ("undecided" if n < 6 else "second ahead")  # 2^(1-6) is the first below a twentieth
    np.testing.assert_allclose(result.mean, paired_differences({"b": second, "a": first})[0].mean * -1)


@pytest.mark.parametrize(
    ("quantile", "low", "verdict"),
    [(1.0, 0.0, "undecided"), (0.5, 0.5, "first ahead"), (1.5, -0.5, "undecided")],
)
def test_an_interval_that_touches_zero_is_no_win(monkeypatch, quantile, low, verdict):
    monkeypatch.setattr("cnnlib.stats.intervals.t_quantile", lambda freedom, level: quantile)
    values = {"a": {0: 1.0, 1: 3.0}, "b": {0: 1.0, 1: 1.0}}  # differences 0 and 2: their mean is 1 +- 1
    (result,) = paired_differences(values)
    assert (result.simultaneous_low, result.simultaneous_high) == (low, 2 - low)
    assert result.verdict == verdict
    (flipped,) = paired_differences({"b": values["b"], "a": values["a"]})
    assert flipped.verdict == verdict.replace("first", "second")


shares = st.lists(st.integers(0, 1000), min_size=6, max_size=6)


@given(shares, shares, st.sampled_from([0.25, 2.0, 1024.0]), st.integers(-512, 512))
def test_order_unit_and_common_shifts_of_seeds_change_nothing_but_signs_and_units(first, second, unit, shift):
    # Numbers of 1/1024 and powers of two: the arithmetic of differences is exact.
    table = np.array([first, second]) / 1024
    (result,) = paired_differences(arms(table))
    (flipped,) = paired_differences(arms(table[::-1]))
    flips = {"first ahead": "second ahead", "second ahead": "first ahead", "undecided": "undecided"}
    assert flipped.verdict == flips[result.verdict]
    signed = ("mean", "low", "high", "simultaneous_low", "simultaneous_high")
    mirror = ("mean", "high", "low", "simultaneous_high", "simultaneous_low")
    for name, other in zip(signed, mirror, strict=True):
        assert getattr(flipped, name) == -getattr(result, other)
    (shifted,) = paired_differences(arms(table + (np.arange(6) + shift) / 1024))
    assert shifted == result
    (scaled,) = paired_differences(arms(unit * table))
    assert (scaled.p, scaled.holm, scaled.verdict) == (result.p, result.holm, result.verdict)
    for name in (*signed, "deviation"):
        assert getattr(scaled, name) == unit * getattr(result, name)


def test_of_all_intervals_one_misses_and_of_all_verdicts_one_is_wrong_in_a_twentieth_of_experiments_at_most():
    random, count = np.random.RandomState(0), 3000
    seeds = random.normal(size=(count, 1, 5))  # what a seed does to all arms, which pairing takes out
    missed = alone = wrong = wrong_holm = 0
    for table in 3 * seeds + random.normal(size=(count, 4, 5)):
        results = paired_differences(arms(table))
        missed += any(not r.simultaneous_low <= 0 <= r.simultaneous_high for r in results)
        wrong += any(r.verdict != "undecided" for r in results)
        wrong_holm += any(r.holm < 0.05 for r in results)
        alone += sum(r.low <= 0 <= r.high for r in results[:1])
    assert agrees(alone / count, 0.95, count)
    # Bonferroni's bound holds, and is no looser than six comparisons that hang together make it.
    assert 0.02 < missed / count < 0.05 + 4 * np.sqrt(0.05 * 0.95 / count)
    assert wrong == missed == wrong_holm  # with no difference anywhere, Holm's first step is Bonferroni's


def test_bonferroni_is_nearly_exact_for_comparisons_that_do_not_hang_together():
    # Two arms each of two families with a seed set of their own: 2 tests of 6 pairs have seeds in common.
    random, count = np.random.RandomState(1), 4000
    wrong = 0
    for one, other in random.normal(size=(count, 2, 2, 5)):
        families = arms(one, "ab") | {name: {k + 10: v for k, v in row.items()} for name, row in arms(other).items()}
        families |= {"c": families.pop("a"), "d": families.pop("b"), **arms(one, "ab")}
        results = paired_differences(families)
        assert results[0].comparisons == 2
        wrong += any(r.verdict != "undecided" for r in results)
    assert agrees(wrong / count, 1 - 0.975**2, count)


# Sentences


def sentences(table, **options):
    return [result.sentence() for result in paired_differences(arms(table, ("conv", "local", "full")), **options)]


def test_a_sentence_says_who_is_ahead_and_how_that_is_known():
    jitter = np.array([-1.0, 0.0, 1.0]) / 1000
    found = sentences(np.array([0.97 + jitter, 0.968 + 3 * jitter, 0.95 - jitter]))
    half = 2 * scipy_stats.t.ppf(1 - 0.025 / 3, 2) / np.sqrt(3) / 10  # deviation 0.2 points
    assert found == [
        "No clear difference: conv minus local is 0.20 points "
        f"(95 % interval {0.2 - half:.2f} to {0.2 + half:.2f}, simultaneous over 3 comparisons, n = 3)",
        "conv is higher than full by 2.00 points "
        f"(95 % interval {2 - half:.2f} to {2 + half:.2f}, simultaneous over 3 comparisons, n = 3)",
        "local is higher than full by 1.80 points "
        f"(95 % interval {1.8 - 2 * half:.2f} to {1.8 + 2 * half:.2f}, simultaneous over 3 comparisons, n = 3)",
    ]
    (behind,) = sentences(np.array([0.95 - jitter, 0.97 + jitter]), level=0.9)
    half = 2 * scipy_stats.t.ppf(0.95, 2) / np.sqrt(3) / 10
    assert behind == (
        f"local is higher than conv by 2.00 points (90 % interval {2 - half:.2f} to {2 + half:.2f}, n = 3)"
    )


def test_a_sentence_of_few_seeds_or_of_equal_differences_says_so():
    one = {"a": {0: 0.9}, "b": {0: 0.8}, "c": {1: 0.7}}
    first, second, _ = (result.sentence() for result in paired_differences(one))
    assert first == "No clear difference: a minus b is 10.00 points (n = 1)"
    assert second == "No clear difference: a and c have no seed in common"
    (equal,) = sentences(np.array([[0.9, 0.8], [0.9, 0.8]]))
    assert equal == (
        "No clear difference: conv minus local is 0.00 points "
        "(95 % interval 0.00 to 0.00, n = 2, all seeds differ by the same)"
    )


def test_a_lead_is_never_shown_as_touching_zero_nor_zero_as_negative():
    half = scipy_stats.t.ppf(0.975, 1) / np.sqrt(2)
    lead = half * np.sqrt(2) + 0.002  # two differences that are 2 apart: a lower end of 0.002 points
    (found,) = sentences(np.array([[lead - 1, lead + 1], [0.0, 0.0]]) / 100)
    assert "is higher than" in found and "interval 0.002 to " in found
    (found,) = sentences(np.array([[1.00001, 0.99999, 0.9], [1.0, 1.0, 0.90001]]))
    assert "-0.00" not in found and "No clear difference" in found


# Power


@pytest.mark.parametrize(
    ("n", "level", "power", "comparisons"),
    [(2, 0.95, 0.8, 1), (5, 0.95, 0.8, 3), (10, 0.99, 0.5, 1), (40, 0.9, 0.9, 6)],
)
def test_a_detectable_difference_is_detected_with_its_power(n, level, power, comparisons):
    difference = detectable_difference(0.3, n, level, power, comparisons)
    count = 40_000
    samples = np.random.RandomState(n).normal(difference, 0.3, size=(count, n))
    low = scipy_stats.ttest_1samp(samples, 0.0, axis=1).confidence_interval(1 - (1 - level) / comparisons).low
    assert agrees(np.mean(low > 0), power, count)
    # and by the noncentral t distribution
    threshold = scipy_stats.t.isf((1 - level) / comparisons / 2, n - 1)
    exact = scipy_stats.nct.sf(threshold, n - 1, difference / 0.3 * np.sqrt(n))
    np.testing.assert_allclose(exact, power, atol=1e-6)


def test_a_detectable_difference_is_that_of_verdicts():
    difference, count = detectable_difference(1.0, 5, comparisons=3), 3000
    tables = np.random.RandomState(0).normal(size=(count, 3, 5)) / np.sqrt(2)  # differences of deviation 1
    tables[:, 1] -= difference
    ahead = [paired_differences(arms(table))[0].verdict == "first ahead" for table in tables]
    assert agrees(np.mean(ahead), 0.8, count)


def test_differences_that_known_numbers_of_seeds_detect():
    # Textbooks on a paired t test (Cohen's d, level 0.05, power 0.8): 0.2 needs 199 pairs, 0.5 needs 34, 0.8 needs 15.
    for d, n in ((0.2, 199), (0.5, 34), (0.8, 15)):
        assert detectable_difference(1.0, n) <= d < detectable_difference(1.0, n - 1)
    # Many seeds: the normal approximation, (1.95996 + 0.84162) / sqrt(n).
    normal = scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(0.8)
    np.testing.assert_allclose(detectable_difference(1.0, 10_000), normal / 100, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deviation": 0.0}, "positive"),
        ({"deviation": float("nan")}, "positive"),
        ({"n": 1}, "two seeds"),
        ({"comparisons": 0}, "one comparison"),
        ({"level": 1.0}, "between 0 and 1"),
        ({"power": 1.0}, "a power lies"),
        ({"power": 0.01}, "a power lies"),
    ],
)
def test_what_has_no_detectable_difference_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        detectable_difference(**{"deviation": 1.0, "n": 5, **arguments})


def test_planned_pairs_are_compared_and_no_others():
    table = np.array([[0.9, 0.92, 0.91], [0.8, 0.83, 0.83], [0.7, 0.72, 0.74], [0.6, 0.6, 0.7]])
    found = paired_differences(arms(table), pairs=[("a", "b"), ("d", "c")])
    assert [(one.first, one.second, one.comparisons) for one in found] == [("a", "b", 2), ("d", "c", 2)]
    with pytest.raises(UserError, match="no arm 'z' to compare with"):
        paired_differences(arms(table), pairs=[("a", "z")])
