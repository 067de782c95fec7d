from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from scipy.optimize import isotonic_regression

from cnnlib.errors import UserError
from cnnlib.stats.fits import Component, log_linear, needed, power_law, variance_components

pytestmark = pytest.mark.once


def agrees(found, share, count):
    """Whether a share found in `count` simulations is the true one, four binomial standard deviations apart at most."""
    return abs(found - share) < 4 * np.sqrt(share * (1 - share) / count)


# Components of variance


def tables(random, shape, initialisation, order, rest):
    rows, columns = shape[-2:]
    return (
        initialisation * random.normal(size=(*shape[:-2], rows, 1))
        + order * random.normal(size=(*shape[:-2], 1, columns))
        + rest * random.normal(size=shape)
    )


def test_components_of_a_table_by_hand():
    # Rows differ by 4 and columns by 2 each side of the mean, with a residual of +-1 in a chequerboard.
    table = 10 + np.array([[4.0], [-4.0]]) + np.array([2.0, -2.0]) + np.array([[1.0, -1.0], [-1.0, 1.0]])
    result = variance_components(table)
    # Mean squares: rows 2 x 32 / 1 = 64, columns 2 x 8 / 1 = 16, rest 4 / 1.
    assert result.initialisation.estimate == (64 - 4) / 2
    assert result.order.estimate == (16 - 4) / 2
    assert result.rest.estimate == 4
    low, high = 4 / scipy_stats.chi2.ppf([0.975, 0.025], 1)
    np.testing.assert_allclose(result.rest[1:], (low, high))
    # Williams: (SS - f_F F MS_rest) / (J chi^2), with 1 and 1 degrees of freedom.
    f_low, f_high = scipy_stats.f.ppf([0.025, 0.975], 1, 1)
    chi_low, chi_high = scipy_stats.chi2.ppf([0.025, 0.975], 1)
    assert result.initialisation.low == max(0, (64 - 4 * f_high) / (2 * chi_high)) == 0
    np.testing.assert_allclose(result.initialisation.high, (64 - 4 * f_low) / (2 * chi_low))
    assert (result.rows, result.columns) == (2, 2)


def test_a_negative_estimate_is_shown_as_0_and_told_apart():
    chequerboard = np.array([[1.0, -1.0], [-1.0, 1.0]])
    result = variance_components(chequerboard)
    assert (result.initialisation.estimate, result.initialisation.variance) == (-2.0, 0.0)
    assert result.initialisation.is_negative and not result.rest.is_negative
    assert (result.initialisation.low, result.initialisation.high) == (0.0, 0.0)
    assert variance_components(np.ones((3, 4)))[:3] == (Component(0.0, 0.0, 0.0),) * 3
    assert not variance_components(np.ones((3, 4))).order.is_negative


@pytest.mark.parametrize("shape", [(5, 5), (4, 8)])
@pytest.mark.parametrize("parts", [(1.0, 0.0, 1.0), (0.5, 2.0, 1.0), (3.0, 3.0, 1.0)])
def test_components_are_found_without_bias_and_covered_by_their_intervals(shape, parts):
    count = 2000
    results = [variance_components(table) for table in tables(np.random.RandomState(0), (count, *shape), *parts)]
    for part, components in zip(parts, zip(*(result[:3] for result in results), strict=True), strict=True):
        estimates = np.array([component.estimate for component in components])
        assert abs(estimates.mean() - part**2) < 4 * estimates.std() / np.sqrt(count)
        covered = np.mean([component.low <= part**2 <= component.high for component in components])
        error = 4 * np.sqrt(0.05 * 0.95 / count)
        assert 0.95 - error < covered < 0.975 + error
    rest = np.mean([result.rest.low <= parts[2] ** 2 <= result.rest.high for result in results])
    assert agrees(rest, 0.95, count)


@given(st.integers(2, 5), st.integers(2, 5), st.sampled_from([0.25, 8.0]), st.integers(0, 99))
def test_components_keep_units_and_sides_apart(rows, columns, unit, seed):
    table = tables(np.random.RandomState(seed), (rows, columns), 1.0, 2.0, 0.5)
    result, turned, scaled = (
        variance_components(table),
        variance_components(table.T),
        variance_components(unit * table + 3),
    )
    np.testing.assert_allclose(turned.initialisation, result.order, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(turned.order, result.initialisation, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scaled[:3], unit**2 * np.array(result[:3]), rtol=1e-9, atol=1e-9)
    # Everything added up is the plain variance of the cells: the sums of squares are split, nothing is lost.
    squares = (
        (rows - 1) * (columns * result.initialisation.estimate + result.rest.estimate)
        + (columns - 1) * (rows * result.order.estimate + result.rest.estimate)
        + (rows - 1) * (columns - 1) * result.rest.estimate
    )
    np.testing.assert_allclose(squares, (rows * columns - 1) * np.var(table, ddof=1))


@pytest.mark.parametrize("table", [np.ones((1, 5)), np.ones((5, 1)), np.ones(5)])
def test_a_table_has_two_seeds_of_each_kind(table):
    with pytest.raises(UserError, match="2 x 2 at least"):
        variance_components(table)


def test_a_table_has_a_value_in_every_cell():
    with pytest.raises(UserError, match="nan at 1, 0"):
        variance_components([[0.5, 0.6], [float("nan"), 0.7]])
    with pytest.raises(UserError, match="level"):
        variance_components(np.eye(3), level=95.0)


# Power laws


def test_a_power_law_is_scipy_s_regression_of_logarithms():
    random = np.random.RandomState(0)
    x = np.repeat([8.0, 16.0, 32.0, 64.0], 5)
    y = 3 * x**1.7 * np.exp(0.2 * random.normal(size=20))
    law, line = power_law(x, y, level=0.9), scipy_stats.linregress(np.log(x), np.log(y))
    np.testing.assert_allclose(law.exponent.value, line.slope)
    np.testing.assert_allclose(law.constant.value, line.intercept)
    half = scipy_stats.t.ppf(0.95, 18) * np.array([line.stderr, line.intercept_stderr])
    np.testing.assert_allclose(law.exponent[1:], (line.slope - half[0], line.slope + half[0]))
    np.testing.assert_allclose(law.constant[1:], (line.intercept - half[1], line.intercept + half[1]))
    residuals = np.log(y) - line.intercept - line.slope * np.log(x)
    np.testing.assert_allclose(law.deviation, np.sqrt(np.sum(residuals**2) / 18))
    assert law.n == 20


def test_a_power_law_without_scatter_is_found():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    law = power_law(x, 5 / x**2)
    np.testing.assert_allclose(law.exponent, (-2.0, -2.0, -2.0))
    np.testing.assert_allclose(law.constant, (np.log(5),) * 3)


def test_two_points_have_an_exponent_and_no_interval():
    law = power_law([2.0, 8.0], [1.0, 16.0])
    np.testing.assert_allclose(law.exponent.value, 2.0)
    assert law.exponent[1:] == law.constant[1:] == (None, None)
    assert (law.deviation, law.lack_of_fit, law.n) == (None, None, 2)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0, 0.0], [1.0, 1.0, 1.0], "x takes a list of positive"),
        ([1.0, 2.0, 3.0], [1.0, -1.0, 1.0], "y takes a list of positive"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 1.0], "y has nan at 1"),
        ([1.0, 2.0], [1.0, 1.0, 1.0], "x has 2 values and y has 3"),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "3 points do not tell"),
        ([2.0], [1.0], "1 points do not tell"),
        ([], [], "0 points do not tell"),
    ],
)
def test_what_has_no_exponent_is_refused(x, y, message):
    with pytest.raises(UserError, match=message):
        power_law(x, y)


def test_exponents_are_covered_by_their_intervals():
    random, count = np.random.RandomState(0), 2000
    k, d = (values.ravel() for values in np.meshgrid([2.0, 4.0, 8.0], [10.0, 30.0, 90.0, 270.0]))
    covered = np.zeros(3)
    for noise in random.normal(size=(count, 12)):
        fit = log_linear({"k": k, "d": d}, 7 * k**1.5 * d**-0.5 * np.exp(0.3 * noise))
        found = (fit.constant, fit.exponents["k"], fit.exponents["d"])
        covered += [c.low <= true <= c.high for c, true in zip(found, (np.log(7), 1.5, -0.5), strict=True)]
    assert all(agrees(share, 0.95, count) for share in covered / count)


def test_several_exponents_are_those_of_the_normal_equations():
    random = np.random.RandomState(1)
    k, d, y = np.exp(random.normal(size=(3, 30)))
    fit = log_linear({"k": k, "d": d}, y)
    matrix = np.stack([np.ones(30), np.log(k), np.log(d)], axis=1)
    inverse = np.linalg.inv(matrix.T @ matrix)
    solution = inverse @ matrix.T @ np.log(y)
    variance = np.sum((np.log(y) - matrix @ solution) ** 2) / 27
    half = scipy_stats.t.ppf(0.975, 27) * np.sqrt(variance * np.diag(inverse))
    found = [fit.constant, *fit.exponents.values()]
    assert list(fit.exponents) == ["k", "d"]
    np.testing.assert_allclose(found, np.stack([solution, solution - half, solution + half], axis=1))
    np.testing.assert_allclose((fit.deviation**2, fit.n), (variance, 30))


def test_exponents_that_go_together_are_not_told_apart():
    k = np.array([1.0, 2.0, 4.0, 8.0])
    with pytest.raises(UserError, match="exponents of k, d apart"):
        log_linear({"k": k, "d": k**2}, k)


@given(st.sampled_from([0.5, 3.0, 100.0]), st.sampled_from([0.1, 7.0]), st.integers(0, 50))
def test_units_change_the_constant_and_no_exponent(x_unit, y_unit, seed):
    random = np.random.RandomState(seed)
    x = np.repeat([1.0, 2.0, 5.0], 3)
    y = np.exp(random.normal(size=9))
    law, other = power_law(x, y), power_law(x_unit * x, y_unit * y)
    np.testing.assert_allclose(other.exponent, law.exponent, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(other.lack_of_fit, law.lack_of_fit, rtol=1e-6)
    shift = np.log(y_unit) - law.exponent.value * np.log(x_unit)
    np.testing.assert_allclose(other.constant.value, law.constant.value + shift, rtol=1e-9, atol=1e-9)


def test_lack_of_fit_is_the_f_test_of_means_against_the_line():
    random = np.random.RandomState(2)
    x = np.repeat([1.0, 2.0, 4.0, 8.0], [2, 3, 4, 1])
    y = np.exp(random.normal(size=10))
    line = scipy_stats.linregress(np.log(x), np.log(y))
    whole = np.sum((np.log(y) - line.intercept - line.slope * np.log(x)) ** 2)
    pure = sum(np.sum((group - group.mean()) ** 2) for group in (np.log(y[x == place]) for place in np.unique(x)))
    expected = scipy_stats.f.sf(((whole - pure) / 2) / (pure / 6), 2, 6)
    np.testing.assert_allclose(power_law(x, y).lack_of_fit, expected)


def test_lack_of_fit_is_uniform_for_a_power_law_and_small_for_another_curve():
    random = np.random.RandomState(0)
    x = np.repeat([10.0, 20.0, 40.0, 80.0], 5)
    fine = [power_law(x, x**1.2 * np.exp(0.1 * noise)).lack_of_fit for noise in random.normal(size=(1000, 20))]
    assert scipy_stats.kstest(fine, "uniform").pvalue > 1e-4
    bent = power_law(x, np.exp(x / 10 + 0.1 * random.normal(size=20)))
    assert bent.lack_of_fit < 1e-6
    assert power_law([1.0, 2.0, 4.0], [1.0, 2.0, 5.0]).lack_of_fit is None  # no replicates
    assert power_law([1.0, 1.0, 4.0, 4.0], [1.0, 2.0, 5.0, 4.0]).lack_of_fit is None  # any two means lie on a line
    # Replicates that are equal, rounding of their mean aside
    x, y = np.repeat([1.0, 2.0, 4.0], 6), np.repeat([17.0, 31.0, 54.0], 6)
    assert power_law(x, y).lack_of_fit is None


# Learning curves


def test_a_level_between_two_sizes_is_interpolated_over_the_logarithm():
    x, y = [100.0, 200.0, 400.0], [0.5, 0.7, 0.9]
    np.testing.assert_allclose(needed(x, y, 0.8), 200 * np.sqrt(2))
    np.testing.assert_allclose(needed(x, y, 0.7), 200)
    np.testing.assert_allclose(needed(x, y, 0.9), 400)
    assert needed(x, y, 0.4) == needed(x, y, 0.5) == 100  # at most that many
    assert needed(x, y, 0.91) is None


def test_a_lucky_size_is_averaged_with_the_worse_ones_after_it():
    # The curve is 0.5, 0.8, 0.8, 0.95: a running maximum would reach 0.85 before 200.
    x, y = [100.0, 200.0, 400.0, 800.0], [0.5, 0.9, 0.7, 0.95]
    np.testing.assert_allclose(needed(x, y, 0.875), 400 * np.sqrt(2))
    assert needed(x[:3], y[:3], 0.85) is None


def test_rounding_keeps_no_curve_from_its_level():
    assert needed([1.0, 2.0, 4.0], [0.178, 0.177, 0.176], 0.177) == 1.0
    assert isotonic_regression([0.178, 0.177, 0.176]).x[0] < 0.177
    assert needed([1.0, 2.0], [0.5 - 5.01e-13, 0.5 - 4.99e-13], 0.5) == 2.0


def test_isotonic_regression_finds_sizes_with_less_bias_than_a_running_maximum():
    random = np.random.RandomState(0)
    x = 2.0 ** np.arange(11)
    truth = np.linspace(0.5, 1.0, 11)  # reaches 0.8 at x = 64
    found, running = [], []
    for noise in 0.05 * random.normal(size=(500, 11)):
        found.append(np.log2(needed(x, truth + noise, 0.8)))
        running.append(np.log2(needed(x, np.maximum.accumulate(truth + noise), 0.8)))
    assert abs(np.mean(found) - 6) < 0.15 < 6 - np.mean(running)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=8), st.integers(1, 100), st.randoms())
def test_the_size_needed_grows_with_the_level_whatever_the_order_and_unit_of_the_sizes(y, level, random):
    x = [float(10 * 2**power) for power in range(len(y))]
    accuracies, level = [value / 100 for value in y], level / 100
    found = needed(x, accuracies, level)
    shuffled = random.sample(list(zip(x, accuracies, strict=True)), len(x))
    other = needed([8 * size for size, _ in shuffled], [value for _, value in shuffled], level)
    if found is None:
        assert other is None
        assert np.mean(accuracies[-1:]) < level or max(accuracies) < level or len(set(accuracies)) > 1
        return
    np.testing.assert_allclose(other, 8 * found)
    assert x[0] <= found <= x[-1] * (1 + 1e-12)
    lower = needed(x, accuracies, level - 0.01)
    assert lower <= found * (1 + 1e-12)
    if np.all(np.diff(accuracies) > 0) and found > x[0]:
        np.testing.assert_allclose(np.interp(np.log(found), np.log(x), accuracies), level)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 1.0], [0.5, 0.6], "each x once"),
        ([1.0, 2.0], [0.5], "one y for each x"),
        ([], [], "one y for each x"),
        ([0.0, 1.0], [0.5, 0.6], "positive"),
        ([1.0, 2.0], [0.5, float("nan")], "y has nan at 1"),
    ],
)
def test_what_is_no_learning_curve_is_refused(x, y, message):
    with pytest.raises(UserError, match=message):
        needed(x, y, 0.5)
