"""What a run's results say of its arms, compared seed by seed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from cnnlib.config import SETTING_FIELDS
from cnnlib.stats import Difference, paired_differences

MOST_ARMS = 6
"""That are compared each with each; of more, each is compared with the first."""
SEEDS = ("seed", "order_seed")


def accuracies(results: dict[str, Any]) -> dict[str, dict[Hashable, float]]:
    """Test accuracies by arm and seed: of the setting that validation chose, and of lanes that have not diverged.

    Arms without a chosen setting are left out, and so are results of before lanes had all of today's numbers.
    """
    found: dict[str, dict[Hashable, float]] = {}
    for arm in results["arms"]:
        chosen = arm.get("chosen_setting")
        if chosen is None:
            continue
        setting = arm["settings"][chosen]
        names = [name for name in SETTING_FIELDS if name in setting]
        found[arm["name"]] = {
            tuple(lane.get(name) for name in SEEDS): lane["test_accuracy"]
            for lane in arm["lanes"]
            if lane["status"] == "ok" and all(lane[name] == setting[name] for name in names)
        }
    return found


def differences(results: dict[str, Any]) -> list[Difference]:
    """Every two arms compared; of more than `MOST_ARMS`, every arm with the first."""
    values = accuracies(results)
    if len(values) < 2:
        return []
    return paired_differences(values, reference=None if len(values) <= MOST_ARMS else next(iter(values)))
