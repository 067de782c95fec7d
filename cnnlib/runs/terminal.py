"""Show the progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cnnlib.runs.callbacks import EpochReport, Watcher


class RunConsole(Console):
    """A console whose reader may close the pipe, as `head` does. The run continues, because its results are files."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_text(report: EpochReport) -> str:
    """Describe the diverged lanes, the loss, the validation accuracy and the speed.

    The text fits beside a bar on 80 columns.
    """
    parts = []
    if report.diverged:
        parts.append(f"{report.diverged} diverged")
    if "train_loss" in report.means:
        parts.append(f"loss {report.means['train_loss']:.4f}")
    if "validation_accuracy" in report.means:
        parts.append(f"validation {100 * report.means['validation_accuracy']:.2f} %")
    speed = report.lane_steps_per_second
    parts.append(f"{speed:,.0f} steps/s" if speed >= 10 else f"{speed:.2g} steps/s")
    return "  ".join(parts)


class BarWatcher(Watcher):
    """Show one bar per arm: lanes, epoch, loss, validation accuracy, steps per second over all lanes, and time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=6),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[means]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BarWatcher:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def says(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def arm_begins(self, name: str, lanes: int, epochs: int) -> None:
        self._tasks[name] = self._progress.add_task(f"{name} x{lanes}", total=epochs, means="compiling")

    def training_begins(self, name: str, epoch: int) -> None:
        for task in self._tasks.values():
            if self._progress.tasks[task].completed == 0:
                self._progress.update(task, means="waiting")
        self._progress.reset(self._tasks[name], completed=epoch, means="training")  # restarts the bar's clock

    def epoch_ends(self, report: EpochReport) -> None:
        self._progress.update(self._tasks[report.arm], completed=report.epoch, means=_report_text(report))


class LineWatcher(Watcher):
    """Print one line per epoch, for logs and pipes.

    Skip an epoch that ends within two seconds of the last line, unless it is the last epoch of the arm.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> LineWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def says(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def arm_begins(self, name: str, lanes: int, epochs: int) -> None:
        self.says(f"{name}: compiling for {epochs} epochs of {lanes} lanes")

    def training_begins(self, name: str, epoch: int) -> None:
        self._first, self._said, self._before = time.monotonic(), 0.0, epoch

    def epoch_ends(self, report: EpochReport) -> None:
        now = time.monotonic()
        if report.epoch < report.epochs and now - self._said < 2.0:
            return
        self._said = now
        left = (now - self._first) / (report.epoch - self._before) * (report.epochs - report.epoch)
        self.says(f"{report.arm}: epoch {report.epoch}/{report.epochs}  {_report_text(report)}  {left:.0f} s left")


def watcher_for(console: Console) -> BarWatcher | LineWatcher:
    """Return a callback that shows bars on a terminal and lines elsewhere."""
    return BarWatcher(console) if console.is_terminal else LineWatcher(console)
