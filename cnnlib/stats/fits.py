"""Fit the values of many runs: variance components, power laws, and the training-set size that reaches an accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from cnnlib.errors import UserError
from cnnlib.stats.intervals import t_quantile


class Component(NamedTuple):
    """A variance component, in the squared unit of the values.

    estimate: the unbiased estimate; it can be negative if the component is small. low, high: the ends of the confidence
    interval; both are at least 0.
    """

    estimate: float
    low: float
    high: float

    @property
    def variance(self) -> float:
        """The estimate to show: 0 if `estimate` is negative."""
        return max(0.0, self.estimate)

    @property
    def is_negative(self) -> bool:
        """Whether `estimate` is negative, so that `variance` shows 0."""
        return self.estimate < 0


class VarianceComponents(NamedTuple):
    """The variance between the runs of one arm, split into parts by source.

    initialisation: the part due to the seed of the initial weights. order: the part due to the seed of the data order.
    rest: the interaction of the two seeds, and all other variance.
    rows: the number of initialisation seeds. columns: the number of order seeds.
    """

    initialisation: Component
    order: Component
    rest: Component
    rows: int
    columns: int


def variance_components(values: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95) -> VarianceComponents:
    """Split the variance of a table of runs by its sources.

    The table has one row per initialisation seed and one column per data-order seed.

    The estimates come from an analysis of variance with two crossed random effects. `rest` has a chi-square interval.
    `initialisation` and `order` have Williams' intervals ("A confidence interval for variance components", Biometrika
    49, 1962). Williams' intervals hold the true value with probability at least 1 - 2 (1 - level). In simulations with
    tables of 2 x 2 to 10 x 10 runs, 95 to 97.5 % of the 95 % intervals held the true value. All three intervals assume
    normal effects. The intervals are wide if there are few seeds: for five seeds, the upper end is eight times the
    estimate. Raises UserError if the table is smaller than 2 x 2 or a value is not finite.
    """
    table = _finite("the table of seeds", values)
    if table.ndim != 2 or min(table.shape) < 2:
        raise UserError(f"the table of seeds is {' x '.join(map(str, table.shape))}: it takes 2 x 2 at least")
    rows, columns = table.shape
    by_row = table.mean(axis=1, keepdims=True) - table.mean()
    by_column = table.mean(axis=0, keepdims=True) - table.mean()
    residual = table - table.mean() - by_row - by_column
    freedom = (rows - 1) * (columns - 1)
    rest = float(np.sum(residual**2)) / freedom
    return VarianceComponents(
        _effect(columns * float(np.sum(by_row**2)) / (rows - 1), rows - 1, rest, freedom, columns, level),
        _effect(rows * float(np.sum(by_column**2)) / (columns - 1), columns - 1, rest, freedom, rows, level),
        Component(rest, *(freedom * rest / chi for chi in _chi_squares(freedom, level))),
        rows,
        columns,
    )


def _effect(square: float, freedom: int, rest: float, rest_freedom: int, cells: int, level: float) -> Component:
    f_low, f_high = special.fdtri(freedom, rest_freedom, [0.5 - level / 2, 0.5 + level / 2])
    chi_high, chi_low = _chi_squares(freedom, level)
    low = freedom * (square - float(f_high) * rest) / (cells * chi_high)
    high = freedom * (square - float(f_low) * rest) / (cells * chi_low)
    return Component((square - rest) / cells, max(0.0, low), max(0.0, high))


def _chi_squares(freedom: int, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise UserError(f"level={level}: a confidence level lies between 0 and 1, such as 0.95")
    return float(special.chdtri(freedom, 0.5 - level / 2)), float(special.chdtri(freedom, 0.5 + level / 2))


class Coefficient(NamedTuple):
    """A fitted coefficient and its t interval. If there are as many coefficients as points, the interval is None."""

    value: float
    low: float | None
    high: float | None


class LogLinear(NamedTuple):
    """The fit log y = constant + a_1 log x_1 + a_2 log x_2 + ... of y to the variables x_i, with the exponents a_i.

    constant: the natural logarithm of the fitted y if every variable is 1.
    exponents: maps each variable's name to its exponent.
    deviation: the residual standard deviation of log y; None if there are as many coefficients as points.
    n: the number of points.
    """

    constant: Coefficient
    exponents: dict[str, Coefficient]
    deviation: float | None
    n: int


class PowerLaw(NamedTuple):
    """The fit log y = constant + exponent log x.

    constant: the natural logarithm of the fitted y at x = 1.
    deviation: the residual standard deviation of log y; None if there are only two points.
    lack_of_fit: the p-value of an F test, which tests whether the means of log y at each x lie on the line. It is None
    if no x has several different y, or if there are fewer than three different x.
    n: the number of points.
    """

    constant: Coefficient
    exponent: Coefficient
    deviation: float | None
    lack_of_fit: float | None
    n: int


def log_linear(
    design: Mapping[str, Sequence[float] | np.ndarray], y: Sequence[float] | np.ndarray, level: float = 0.95
) -> LogLinear:
    """Fit a product of powers, such as y = c k^p d^q, to points by least squares in logarithms.

    `design` maps the name of each variable, such as "k", to its values, one per point. The fit finds the constant c and
    the exponents p and q.

    The intervals assume that the residuals of log y are independent and normal, and that their variances are equal. If
    several points share a seed, they are correlated, and the intervals are too short. If you leave out points because
    no y could be found for them, the exponents are biased. Raises UserError if a value is not positive, or if the
    points do not determine the exponents.
    """
    logs = {name: _logarithms(name, x) for name, x in design.items()}
    target = _logarithms("y", y)
    for name, values in logs.items():
        if values.shape != target.shape:
            raise UserError(f"{name} has {len(values)} values and y has {len(target)}: it takes one of each a point")
    matrix = np.stack([np.ones(len(target)), *logs.values()], axis=1)
    n, unknowns = matrix.shape
    solution, _, rank, _ = np.linalg.lstsq(matrix, target)
    if rank < unknowns:
        raise UserError(f"{n} points do not tell the exponents of {', '.join(logs)} apart: vary each by itself")
    freedom = n - unknowns
    if freedom == 0:
        constant, *exponents = (Coefficient(float(value), None, None) for value in solution)
        return LogLinear(constant, dict(zip(logs, exponents, strict=True)), None, n)
    deviation = math.sqrt(float(np.sum((target - matrix @ solution) ** 2)) / freedom)
    # Invert R, not X'X: the condition number of X'X is the square of R's.
    errors = deviation * np.linalg.norm(np.linalg.inv(np.linalg.qr(matrix).R), axis=1)
    halves = t_quantile(freedom, level) * errors
    constant, *exponents = (
        Coefficient(float(value), float(value - half), float(value + half))
        for value, half in zip(solution, halves, strict=True)
    )
    return LogLinear(constant, dict(zip(logs, exponents, strict=True)), deviation, n)


def power_law(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float = 0.95) -> PowerLaw:
    """Fit y = c x^b by least squares in logarithms. Several points may have the same x. See `log_linear`.

    If `lack_of_fit` is small, the points do not follow a power law, and the exponent's interval means little.
    """
    constant, exponents, deviation, n = log_linear({"x": x}, y, level)
    return PowerLaw(constant, exponents["x"], deviation, _lack_of_fit(_logarithms("x", x), _logarithms("y", y)), n)


def _lack_of_fit(x: np.ndarray, y: np.ndarray) -> float | None:
    places, group, count = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(group, y) / count
    deviations = y - means[group]
    # Rounding can make the mean of three equal numbers differ from the numbers. Do not count this as scatter.
    if len(places) < 3 or np.abs(deviations).max() <= 1e-12 * max(1.0, np.abs(y).max()):
        return None
    pure = float(np.sum(deviations**2))
    matrix = np.stack([np.ones(len(places)), places], axis=1) * np.sqrt(count)[:, np.newaxis]
    target = means * np.sqrt(count)
    lack = float(np.sum((target - matrix @ np.linalg.lstsq(matrix, target)[0]) ** 2))
    freedom, rest = len(places) - 2, len(y) - len(places)
    return float(special.fdtrc(freedom, rest, (lack / freedom) / (pure / rest)))


def needed(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float) -> float | None:
    """Find the training-set size at which one seed's learning curve reaches the accuracy `level`.

    Return None if the curve never reaches it.

    The curve is the isotonic regression of the accuracies `y` on the sizes `x`. Between its points, it is linear in log
    x. A running maximum would keep every lucky point, and the sizes would be too small. Isotonic regression averages a
    lucky point with the worse points after it. If the curve is at or above `level` already at the smallest size, return
    this size. It is only an upper bound.
    """
    sizes, accuracies = _logarithms("x", x), _finite("y", y)
    if sizes.shape != accuracies.shape or len(np.unique(sizes)) != len(sizes) or not len(sizes):
        raise UserError("a learning curve takes one y for each x, and each x once")
    from scipy.optimize import isotonic_regression  # imported here: the import takes half a second

    order = np.argsort(sizes)
    sizes, curve = sizes[order], isotonic_regression(accuracies[order]).x
    reached = curve >= level - 1e-12 * abs(level)  # rounding can make a mean of equal numbers smaller
    if not reached[-1]:
        return None
    after = int(np.argmax(reached))
    if after == 0:
        return float(np.min(x))
    share = min(1.0, (level - curve[after - 1]) / (curve[after] - curve[after - 1]))
    return math.exp(sizes[after - 1] + share * (sizes[after] - sizes[after - 1]))


def _finite(name: str, values: Sequence[float] | Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, np.float64)
    for place in np.argwhere(~np.isfinite(array)):
        raise UserError(f"{name} has {array[tuple(place)]} at {', '.join(map(str, place))}: it takes finite numbers")
    return array


def _logarithms(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = _finite(name, values)
    if array.ndim != 1 or np.any(array <= 0):
        raise UserError(f"{name} takes a list of positive numbers: their logarithms are fitted")
    logarithms: np.ndarray = np.log(array)
    return logarithms
