"""Means with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval; without values there is no mean, with one no interval (None)."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of Student's t with n - 1 degrees of freedom: mean +- t_0.975 s / sqrt(n).

    It covers the mean of a normal population in 95 % of samples (Student 1908); n is at least 2 for an interval.
    """
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(special.stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
