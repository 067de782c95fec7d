"""Write what a run tells its user to `log.txt`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TextIO

from cnnlib.runs.callbacks import Beginning, EpochReport, Watcher
from cnnlib.system.files import _not_through_links, cannot_write
from cnnlib.system.provenance import now


class Log(Watcher):
    """A callback that writes all messages to `log.txt`, with times. Messages wait until the run's folder is open."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._file: TextIO | None = None

    def says(self, text: str) -> None:
        self._lines.append(f"{now()} {' '.join(text.split())}\n")
        if self._file is not None:
            with cannot_write(Path(self._file.name)):
                self._file.write("".join(self._lines))
                self._file.flush()
            self._lines.clear()

    def run_begins(self, beginning: Beginning) -> None:
        path = beginning.folder / "log.txt"
        with cannot_write(path):
            # Do not follow links: the folder may come from a stranger, and its links may lead anywhere.
            self._file = open(path, "a", encoding="utf-8", opener=_not_through_links)  # noqa: SIM115  # closed by close()
        if beginning.record.command:
            self._lines.insert(0, f"{now()} {beginning.record.command}\n")
        self.says("resumed" if beginning.is_resumed else "begun")

    def training_begins(self, name: str, epoch: int) -> None:
        self.says(f"{name}: trains" + (f", after epoch {epoch}" if epoch else ""))

    def epoch_ends(self, report: EpochReport) -> None:
        means = "  ".join(f"{key} {value:.6f}" for key, value in report.means.items())
        diverged = f"  {report.diverged} of {report.lanes} lanes diverged" if report.diverged else ""
        self.says(f"{report.arm}: epoch {report.epoch}/{report.epochs}  {means}{diverged}")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # `says` has reported errors of writing
                self._file.close()
            self._file = None
