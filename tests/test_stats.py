from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cnnlib.stats import mean_interval


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_interval_is_student_s(n):
    values = np.random.RandomState(n).normal(size=n)
    low, high = scipy_stats.t.interval(0.95, n - 1, values.mean(), scipy_stats.sem(values))
    interval = mean_interval(list(values))
    assert interval.n == n
    np.testing.assert_allclose(interval[:3], [values.mean(), low, high])


def test_one_value_has_a_mean_and_no_interval_and_none_has_neither():
    assert mean_interval([0.5]) == (0.5, None, None, 1)
    assert mean_interval([]) == (None, None, None, 0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    samples = np.random.RandomState(0).normal(size=(4000, 5))
    intervals = [mean_interval(list(sample)) for sample in samples]
    covered = np.mean([i.low <= 0.0 <= i.high for i in intervals])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)
