"""How a run shows itself while it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class RunConsole(Console):
    """A console whose reader may leave, as `head` does: a run goes on without it, since its results are files."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _means_text(means: dict[str, float], diverged: int) -> str:
    parts = []
    if "train_loss" in means:
        parts.append(f"loss {means['train_loss']:.4f}")
    if "validation_accuracy" in means:
        parts.append(f"validation {100 * means['validation_accuracy']:.2f} %")
    if diverged:
        parts.append(f"{diverged} diverged")
    return "  ".join(parts)


class BarWatcher:
    """A bar an arm: epoch, loss, validation accuracy, time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
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

    def training_begins(self, name: str) -> None:
        for task in self._tasks.values():
            if self._progress.tasks[task].completed == 0:
                self._progress.update(task, means="waiting")
        self._progress.reset(self._tasks[name], means="training")  # restarts its clock

    def epoch_ends(self, name: str, epoch: int, means: dict[str, float], diverged: int) -> None:
        self._progress.update(self._tasks[name], completed=epoch, means=_means_text(means, diverged))

    def arm_ends(self, name: str) -> None:
        pass


class LineWatcher:
    """A line an epoch for logs and pipes, at most one every two seconds, and always the last of an arm."""

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
        self._epochs = epochs

    def training_begins(self, name: str) -> None:
        self._first, self._said = time.monotonic(), 0.0

    def epoch_ends(self, name: str, epoch: int, means: dict[str, float], diverged: int) -> None:
        now = time.monotonic()
        if epoch < self._epochs and now - self._said < 2.0:
            return
        self._said = now
        left = (now - self._first) / epoch * (self._epochs - epoch)
        self.says(f"{name}: epoch {epoch}/{self._epochs}  {_means_text(means, diverged)}  {left:.0f} s left")

    def arm_ends(self, name: str) -> None:
        pass


def watcher_for(console: Console) -> BarWatcher | LineWatcher:
    """Bars on a terminal, lines elsewhere."""
    return BarWatcher(console) if console.is_terminal else LineWatcher(console)
