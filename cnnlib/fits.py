"""What is fitted to values of many runs: components of variance, power laws, sizes that a learning curve needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from cnnlib.errors import UserError
from cnnlib.stats import t_quantile


class Component(NamedTuple):
    """A component of variance, in the square of the values' unit.

    estimate: unbiased, and negative at times where the component is small. low, high: its interval, from 0 up.
    """

    estimate: float
    low: float
    high: float

    @property
    def variance(self) -> float:
        """The estimate to show: 0 where it is negative."""
        return max(0.0, self.estimate)

    @property
    def is_negative(self) -> bool:
        """Whether the 0 that is shown stands for a negative estimate."""
        return self.estimate < 0


class Spread(NamedTuple):
    """How far runs of one arm scatter, and why.

    initialisation, order: what the seed of the initial weights, and that of the order of the data, contribute.
    rest: their interaction and everything else. rows, columns: how many seeds of the first and of the second there are.
    """

    initialisation: Component
    order: Component
    rest: Component
    rows: int
    columns: int


def spread(values: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95) -> Spread:
    """Splits the variance of a table of runs, a row an initialisation seed, a column a data-order seed, a value a cell.

    Estimates of the analysis of variance for two crossed random effects. The interval of the rest is that of chi
    square; those of the effects are Williams' ("A confidence interval for variance components", Biometrika 49, 1962):
    they cover in a share of 1 - 2 (1 - level) at least, and 95 % ones did so in 95 to 97.5 % of simulated tables of
    2 x 2 to 10 x 10. All three want normal effects, and stay wide for few seeds: with five of them the upper end is
    eight times the estimate. Both sides are at least 2; a cell without a finite value raises UserError.
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
    return Spread(
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
    """A fitted number and its interval of Student's t; none (None) where as many numbers are fitted as points."""

    value: float
    low: float | None
    high: float | None


class LogLinear(NamedTuple):
    """log y = constant + sum of exponent log x.

    constant: natural logarithm of y where every x is 1. exponents: by the names of the design. deviation: of log y from
    the fit, by degrees of freedom; None where there are none. n: points.
    """

    constant: Coefficient
    exponents: dict[str, Coefficient]
    deviation: float | None
    n: int


class PowerLaw(NamedTuple):
    """log y = constant + exponent log x.

    constant: natural logarithm of y where x is 1. deviation: of log y from the fit, by degrees of freedom; None where
    there are none. lack_of_fit: p value of the F test that the means of log y at each x lie on the line; None without
    several y at some x that differ, or with fewer than three x. n: points.
    """

    constant: Coefficient
    exponent: Coefficient
    deviation: float | None
    lack_of_fit: float | None
    n: int


def log_linear(
    design: Mapping[str, Sequence[float] | np.ndarray], y: Sequence[float] | np.ndarray, level: float = 0.95
) -> LogLinear:
    """Fits y ~ c k^p d^q ... by least squares in logarithms; `design` maps a name, such as "k", to a value a point.

    The intervals take the deviations of log y for independent, normal and of one size: points that share a seed are
    nearer to each other than that, and then the intervals are too short. Points whose y was out of reach cannot be
    left out without bending the exponents. All numbers are positive, or UserError.
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
    # The inverse of R and not of X'X, whose condition is the square.
    errors = deviation * np.linalg.norm(np.linalg.inv(np.linalg.qr(matrix).R), axis=1)
    halves = t_quantile(freedom, level) * errors
    constant, *exponents = (
        Coefficient(float(value), float(value - half), float(value + half))
        for value, half in zip(solution, halves, strict=True)
    )
    return LogLinear(constant, dict(zip(logs, exponents, strict=True)), deviation, n)


def power_law(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float = 0.95) -> PowerLaw:
    """Fits y = c x^b by least squares in logarithms, over points of which several may have one x: see `log_linear`.

    A small `lack_of_fit` says that the points lie on no power law, and that the exponent's interval means little.
    """
    constant, exponents, deviation, n = log_linear({"x": x}, y, level)
    return PowerLaw(constant, exponents["x"], deviation, _lack_of_fit(_logarithms("x", x), _logarithms("y", y)), n)


def _lack_of_fit(x: np.ndarray, y: np.ndarray) -> float | None:
    places, group, count = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(group, y) / count
    deviations = y - means[group]
    # The mean of three equal numbers can differ from them: what rounding leaves is no scatter to judge the line by.
    if len(places) < 3 or np.abs(deviations).max() <= 1e-12 * max(1.0, np.abs(y).max()):
        return None
    pure = float(np.sum(deviations**2))
    matrix = np.stack([np.ones(len(places)), places], axis=1) * np.sqrt(count)[:, np.newaxis]
    target = means * np.sqrt(count)
    lack = float(np.sum((target - matrix @ np.linalg.lstsq(matrix, target)[0]) ** 2))
    freedom, rest = len(places) - 2, len(y) - len(places)
    return float(special.fdtrc(freedom, rest, (lack / freedom) / (pure / rest)))


def needed(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float) -> float | None:
    """The training-set size at which the learning curve of one seed reaches accuracy `level`; None if it never does.

    The curve is the isotonic regression of y (accuracies) on x (sizes), straight between its points over log x. A
    running maximum would take each lucky point for good and find sizes too small; isotonic regression averages it with
    the worse ones after it. A curve that begins at `level` or above gives the smallest x: at most that many are needed.
    """
    sizes, accuracies = _logarithms("x", x), _finite("y", y)
    if sizes.shape != accuracies.shape or len(np.unique(sizes)) != len(sizes) or not len(sizes):
        raise UserError("a learning curve takes one y for each x, and each x once")
    from scipy.optimize import isotonic_regression  # takes half a second to import

    order = np.argsort(sizes)
    sizes, curve = sizes[order], isotonic_regression(accuracies[order]).x
    reached = curve >= level - 1e-12 * abs(level)  # the mean of three equal numbers can be less than they are
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
