"""Write a run's metrics, the lines of `metrics.jsonl`, for TensorBoard. Only this file imports tensorboardX."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnlib.errors import UserError
from cnnlib.runs.callbacks import Beginning, EpochReport, Watcher
from cnnlib.runs.folder import TENSORBOARD, inside
from cnnlib.runs.metrics import METRICS, MetricsLine, lane_name, means_of
from cnnlib.runs.results import ArmResult


class TensorBoard(Watcher):
    """Write the metrics of each lane to `tensorboard/ARM/LANE`.

    The means and standard deviations over lanes go to `tensorboard/ARM/mean`.
    """

    def __init__(self) -> None:
        """Raise UserError if tensorboardX is not installed."""
        if importlib.util.find_spec("tensorboardX") is None:
            raise UserError("--tensorboard needs cnnlib's extra `tensorboard`: pip install -e '.[tensorboard]'")
        self._folder = Path()
        self._writers: dict[str, list[Any]] = {}

    def run_begins(self, beginning: Beginning) -> None:
        """Choose the folder. Raises UserError if a link in its path leads out of the run's folder."""
        self._folder = inside(beginning.folder, beginning.folder / TENSORBOARD)

    def epoch_ends(self, report: EpochReport) -> None:
        """Write the metrics of each lane, and their means over lanes."""
        *lanes, mean = self._of(report.arm, report.lines)
        for writer, line in zip(lanes, report.lines, strict=True):
            self._write(writer, {key: getattr(line, key) for key in METRICS}, report.epoch)
        self._write(mean, means_of(report.lines, METRICS), report.epoch)

    def _of(self, arm: str, lines: Sequence[MetricsLine]) -> list[Any]:
        if arm not in self._writers:
            from tensorboardX import SummaryWriter

            lanes = [line.numbers for line in lines]
            names = [*(lane_name(arm, lane, lanes) for lane in lanes), "mean"]
            self._writers[arm] = [SummaryWriter(str(self._folder / arm / name)) for name in names]
        return self._writers[arm]

    def _write(self, writer: Any, row: Mapping[str, float | None], epoch: int) -> None:
        for key, value in row.items():
            if value is not None:
                writer.add_scalar(key, value, epoch)
        writer.flush()

    def arm_ends(self, name: str, result: ArmResult, epoch: int) -> None:
        """Close the arm's files."""
        self._close(name)

    def close(self) -> None:
        """Close the files of arms that did not reach their end."""
        for name in list(self._writers):
            self._close(name)

    def _close(self, name: str) -> None:
        for writer in self._writers.pop(name, ()):
            writer.close()
