"""The lines of `metrics.jsonl`: read them, average them over lanes (the models of an arm), and make names for lanes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cnnlib.config.fields import from_dict
from cnnlib.config.schema import LaneNumbers
from cnnlib.errors import UserError
from cnnlib.runs.results import OfLane, Status
from cnnlib.system.files import read_json_lines


@dataclass(frozen=True, kw_only=True)
class MetricsLine(OfLane):
    """One line of `metrics.jsonl`: the metrics of one lane in one epoch. The metrics of a diverged lane are None."""

    arm: str
    lane: int
    epoch: int
    status: Status
    train_loss: float | None = None
    """Mean over the batches of the epoch, while the parameters change."""
    train_accuracy: float | None = None
    validation_loss: float | None = None
    """None without validation examples."""
    validation_accuracy: float | None = None
    seconds: float
    """Training time of the epoch, for all lanes of the arm together."""


METRICS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
"""The metrics in a line."""


class HasStatus(Protocol):
    """A line of metrics, or the result of a lane."""

    @property
    def status(self) -> Status:
        """Whether the lane has diverged."""


def parse_line(values: Mapping[str, object]) -> MetricsLine:
    """Check and convert an object of `metrics.jsonl`. Raise UserError if it is damaged."""
    line: MetricsLine = from_dict(values, MetricsLine, "metrics")
    return line


def read_metrics(path: Path) -> tuple[MetricsLine, ...]:
    """Read a `metrics.jsonl` up to the first damaged line. If no file exists, return no lines."""
    found = []
    for values in read_json_lines(path):
        try:
            found.append(parse_line(values))
        except UserError:  # a run that was killed may leave half a line
            break
    return tuple(found)


def means_of(lines: Sequence[HasStatus], metrics: Sequence[str]) -> dict[str, float | None]:
    """Return the mean and sample standard deviation of each metric over the lanes that have not diverged."""
    fine = [line for line in lines if line.status == "ok"]
    found: dict[str, float | None] = {"lanes_ok": len(fine)}
    for metric in metrics:
        values = [value for line in fine if (value := getattr(line, metric)) is not None]
        found[metric] = float(np.mean(values)) if values else None
        found[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def lane_name(arm: str, lane: LaneNumbers, lanes: Sequence[LaneNumbers]) -> str:
    """Return a lane's name, such as `lenet5 seed 3 learning_rate 0.01`.

    It contains the arm, the seed, and every other field that varies over the lanes.
    """
    same = {"seed"} | ({"order_seed"} if all(other.order_seed == other.seed for other in lanes) else set())
    varied = [key for key in lane._fields if len({getattr(other, key) for other in lanes}) > 1 and key not in same]
    return " ".join([arm, f"seed {lane.seed}", *(f"{key} {getattr(lane, key):g}" for key in varied)])
