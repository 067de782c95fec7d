"""Comparisons of a run's arms, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from cnnlib.config.fields import from_dict
from cnnlib.runs.results import RunResults
from cnnlib.stats.fits import VarianceComponents, variance_components
from cnnlib.stats.intervals import Difference, paired_differences

MOST_ARMS = 6
"""If a run has at most this many arms, compare every pair. If it has more, compare each arm with the first arm."""


def accuracies(results: RunResults) -> dict[str, dict[Hashable, float]]:
    """Return test accuracies by arm, then by seed and order seed, for the setting that validation chose.

    Diverged lanes and arms without a chosen setting are left out.
    """
    return {
        arm.name: {
            (lane.seed, lane.order_seed): lane.test_accuracy
            for lane in arm.lanes_of(arm.settings[arm.chosen_setting])
            if lane.status == "ok" and lane.test_accuracy is not None
        }
        for arm in results.arms
        if arm.chosen_setting is not None
    }


def differences(results: RunResults, planned: Sequence[str] = ()) -> list[Difference]:
    """Compare the pairs of arms in `planned`, written FIRST:SECOND.

    If `planned` is empty, use the pairs in the run's configuration. If the configuration has no pairs either, compare
    every pair of arms; with more than `MOST_ARMS` arms, compare only each arm with the first arm.
    """
    values = accuracies(results)
    if len(values) < 2:
        return []
    stored: tuple[str, ...] = from_dict(results.config.get("comparisons", []), tuple[str, ...], "comparisons")
    pairs = [pair.partition(":")[::2] for pair in planned or stored]
    known = [(first, second) for first, second in pairs if first in values and second in values]
    if known:
        return paired_differences(values, pairs=known)
    return paired_differences(values, reference=None if len(values) <= MOST_ARMS else next(iter(values)))


def spreads(results: RunResults) -> dict[str, VarianceComponents]:
    """Estimate which part of the spread of an arm's accuracy comes from initial weights, and which from data order.

    Leave out an arm if some seed did not run with every data order.
    """
    found = {}
    for arm, values in accuracies(results).items():
        seeds, orders = (list(dict.fromkeys(pair[place] for pair in values)) for place in (0, 1))  # type: ignore[index]
        if len(seeds) > 1 and len(orders) > 1 and len(values) == len(seeds) * len(orders):
            found[arm] = variance_components([[values[seed, order] for order in orders] for seed in seeds])
    return found


def spread_sentence(arm: str, found: VarianceComponents) -> str:
    """Describe the spread in words. The text has standard deviations in percentage points and their intervals."""
    parts = (("initial weights", found.initialisation), ("data order", found.order), ("the rest", found.rest))
    texts = []
    for name, part in parts:
        estimate, low, high = (100 * math.sqrt(value) for value in (part.variance, part.low, part.high))
        negative = " (the variance is estimated below 0)" if part.is_negative else ""
        texts.append(f"{name} {estimate:.2f} [{low:.2f}, {high:.2f}]{negative}")
    return (
        f"{arm}, {found.rows} initialisations by {found.columns} orders: standard deviations in points with 95 % "
        f"intervals, {', '.join(texts)}"
    )
