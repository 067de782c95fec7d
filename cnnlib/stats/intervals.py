"""Compute confidence intervals of means, compare arms by seed, and say which difference a comparison would detect."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from cnnlib.errors import UserError

Verdict = Literal["first ahead", "second ahead", "undecided"]


class Interval(NamedTuple):
    """A mean of n values and its confidence interval. If n = 0, `mean` is None. If n < 2, `low` and `high` are None."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def t_quantile(freedom: int, level: float) -> float:
    """Return t with P(|T| > t) = 1 - level, where T has Student's distribution and `freedom` degrees of freedom."""
    if not 0 < level < 1:
        raise UserError(f"level={level}: a confidence level lies between 0 and 1, such as 0.95")
    return float(special.stdtrit(freedom, 0.5 + level / 2))


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Return the mean of `values` and its Student's t interval: mean +- t s / sqrt(n).

    n is the number of values and s their standard deviation; t has n - 1 degrees of freedom. If the population is
    normal, the interval covers its mean with probability `level` (Student 1908). The interval needs n >= 2.
    """
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, None, None, 1)
    half = t_quantile(n - 1, level) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


class Difference(NamedTuple):
    """The first arm's values minus the second arm's values, paired by common seed. Higher values are better.

    first, second: the names of the arms. n: the number of common seeds.
    mean: the mean difference; None if n = 0. If n < 2, all fields from `deviation` to `simultaneous_high` are None.
    deviation: the standard deviation of the differences.
    low, high: the ends of Student's t interval for this difference alone.
    p: the p-value of the two-sided t test of no difference.
    holm: the value of `p` after correction for all comparisons (Holm 1979).
    simultaneous_low, simultaneous_high: the ends of the wider Bonferroni interval. The Bonferroni intervals of all
    comparisons (their number is `comparisons`) hold together with probability `level`.
    verdict: which arm is higher. The Bonferroni interval decides.
    """

    first: str
    second: str
    n: int
    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    p: float | None
    holm: float | None
    simultaneous_low: float | None
    simultaneous_high: float | None
    comparisons: int
    level: float
    verdict: Verdict

    def sentence(self) -> str:
        """Return the result as a sentence in percentage points. Values must be fractions of 1, such as accuracies."""
        if self.mean is None:
            return f"No clear difference: {self.first} and {self.second} have no seed in common"
        unclear = f"No clear difference: {self.first} minus {self.second} is"
        if self.simultaneous_low is None or self.simultaneous_high is None:
            return f"{unclear} {_points(self.mean)} points (n = {self.n})"
        kind = f"simultaneous over {self.comparisons} comparisons, " if self.comparisons > 1 else ""
        equal = "" if self.deviation else ", all seeds differ by the same"
        numbers = (self.mean, self.simultaneous_low, self.simultaneous_high)
        higher, lower = self.first, self.second
        if self.verdict == "second ahead":
            higher, lower, numbers = lower, higher, (-numbers[0], -numbers[2], -numbers[1])
        decimals = 2
        # Never show the interval of a clear difference as 0.00 to ...
        while self.verdict != "undecided" and decimals < 12 and round(100 * numbers[1], decimals) <= 0:
            decimals += 1
        mean, low, high = (_points(number, decimals) for number in numbers)
        known = f"({100 * self.level:g} % interval {low} to {high}, {kind}n = {self.n}{equal})"
        if self.verdict == "undecided":
            return f"{unclear} {mean} points {known}"
        return f"{higher} is higher than {lower} by {mean} points {known}"


def _points(share: float, decimals: int = 2) -> str:
    return f"{round(100 * share, decimals) + 0.0:.{decimals}f}"  # + 0.0 turns -0.0 into 0.0


def paired_differences(
    values: Mapping[str, Mapping[Hashable, float]],
    level: float = 0.95,
    reference: str | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> list[Difference]:
    """Compare arms by the seeds that both arms have.

    `values` maps an arm's name to a mapping from seeds to values. If `pairs` are given, only these pairs are compared.
    If `reference` is given, every other arm is compared with it. Otherwise every pair of arms is compared. The verdict
    names an arm only if the simultaneous interval does not contain zero. Comparisons with fewer than two common seeds
    are undecided and not counted. If accuracies come from few examples, all differences can be equal up to rounding.
    Then each interval is a single point. In this case `p` is the p-value of the sign test, 2^(1-n) for n common seeds,
    and it determines the verdict. The intervals hold for new seeds on the same data set, not for other data sets. They
    assume that the seeds are independent and the differences are normal. Raises UserError for unknown arms and for
    values that are not finite. Leave out diverged lanes (models), and report that you did.
    """
    for name in (*([reference] if reference is not None else []), *(name for pair in pairs for name in pair)):
        if name not in values:
            raise UserError(f"no arm {name!r} to compare with: there are {', '.join(values)}")
    for arm, by_seed in values.items():
        for seed, value in by_seed.items():
            if not math.isfinite(value):
                raise UserError(f"{arm} has {value} for {seed!r}: differences want finite numbers")
    if not pairs:
        others = [(arm, reference) for arm in values if arm != reference and reference is not None]
        pairs = list(combinations(values, 2)) if reference is None else others
    samples = [_paired(values[first], values[second]) for first, second in pairs]
    comparisons = sum(len(sample) > 1 for sample in samples)
    results = []
    for (first, second), sample in zip(pairs, samples, strict=True):
        n = len(sample)
        if n < 2:
            rest = (None,) * 7
            results.append(
                Difference(first, second, n, sample[0] if n else None, *rest, comparisons, level, "undecided")
            )
            continue
        equal = np.ptp(sample) == 0  # if equal, np.mean and np.std would add rounding errors
        mean, deviation = (float(sample[0]), 0.0) if equal else (float(np.mean(sample)), float(np.std(sample, ddof=1)))
        error = deviation / math.sqrt(n)
        half = t_quantile(n - 1, level) * error
        wide = t_quantile(n - 1, 1 - (1 - level) / comparisons) * error
        p = 2 * float(special.stdtr(n - 1, -abs(mean) / error)) if error else 2.0 ** (1 - n) if mean else 1.0
        verdict: Verdict = "undecided"
        if error or comparisons * p < 1 - level:
            verdict = "first ahead" if mean - wide > 0 else "second ahead" if mean + wide < 0 else "undecided"
        ends = (mean - half, mean + half, p, None, mean - wide, mean + wide)
        results.append(Difference(first, second, n, mean, deviation, *ends, comparisons, level, verdict))
    corrected = iter(holm([result.p for result in results if result.p is not None]))
    return [result if result.p is None else result._replace(holm=next(corrected)) for result in results]


def _paired(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> list[float]:
    pairs = [(float(value), float(second[seed])) for seed, value in first.items() if seed in second]
    differences = [one - other for one, other in pairs]
    # In binary, 0.05 - 0.03 differs from 0.31 - 0.29. Treat such differences as equal, so that t is not huge.
    noise = 4 * float(np.finfo(np.float64).eps) * max((abs(value) for pair in pairs for value in pair), default=0.0)
    if differences and max(differences) - min(differences) <= noise:
        return [differences[0] if abs(differences[0]) > noise else 0.0] * len(differences)
    return differences


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down method for the family-wise error rate. Return them in the given order.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p, np.float64)[order])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in corrected]


def detectable_difference(
    deviation: float, n: int, level: float = 0.95, power: float = 0.8, comparisons: int = 1
) -> float:
    """Return the smallest true mean difference that `n` seeds detect with probability `power`.

    A difference is detected if its interval lies on the same side of zero as the true difference. `deviation` is the
    standard deviation of the paired differences. The result has the same unit. If `deviation` was estimated from few
    seeds, the result is a rough estimate too. If `comparisons` > 1, the intervals are Bonferroni intervals. The result
    comes from the noncentral t distribution. The true power at the returned difference equals `power` up to about 1e-6.
    """
    if not (math.isfinite(deviation) and deviation > 0):
        raise UserError(f"deviation={deviation}: the deviation of the differences is a positive number")
    if n < 2 or comparisons < 1:
        raise UserError(f"n={n}, comparisons={comparisons}: it takes two seeds and one comparison at least")
    threshold = t_quantile(n - 1, 1 - (1 - level) / comparisons)
    if not (1 - level) / comparisons < power < 1:
        raise UserError(f"power={power}: a power lies between 1 - level and 1, such as 0.8")
    return deviation * float(special.nctdtrinc(n - 1, 1 - power, threshold)) / math.sqrt(n)
