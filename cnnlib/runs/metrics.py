"""Average the lines of `metrics.jsonl` over lanes (the models of an arm), and make names for lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def means_of(lines: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the mean and sample standard deviation of each metric over the lanes that have not diverged."""
    fine = [line for line in lines if line["status"] == "ok"]
    found: dict[str, Any] = {"lanes_ok": len(fine)}
    for metric in metrics:
        values = [line[metric] for line in fine if line.get(metric) is not None]
        found[metric] = float(np.mean(values)) if values else None
        found[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def lane_name(arm: str, lane: dict[str, Any], lanes: Sequence[dict[str, Any]]) -> str:
    """Return a lane's name, such as `lenet5 seed 3 learning_rate 0.01`.

    It contains the arm, the seed, and every other field that varies over the lanes.
    """
    same = {"seed"} | ({"order_seed"} if all(other["order_seed"] == other["seed"] for other in lanes) else set())
    varied = [key for key in lane if len({other[key] for other in lanes}) > 1 and key not in same]
    return " ".join([arm, f"seed {lane['seed']}", *(f"{key} {lane[key]:g}" for key in varied)])
