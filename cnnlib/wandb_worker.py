"""The process that copies a run to Weights & Biases: `python -m cnnlib.wandb_worker`; the only file that knows wandb.

It reads one JSON object a line and writes one only when something is wrong, so that W&B may hang, fail or die without
the training process: that one puts lines into a pipe, and never waits. It runs at the lowest priority.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from cnnlib import priority

SUMMARIES = {"train_loss": "min", "train_accuracy": "max", "validation_loss": "min", "validation_accuracy": "max"}
"""What W&B keeps of each metric beside its last value, which is the summary of all others."""


class Copy:
    """The W&B runs of one session; each method is what a line of that name does."""

    def __init__(self) -> None:
        # wandb looks for these to make a table of strings, and takes a second over it.
        sys.modules.update(dict.fromkeys(("pandas", "pyarrow")))  # type: ignore[arg-type]
        import wandb

        self._wandb = wandb
        self._common: dict[str, Any] = {}
        self._mode: Any = "offline"
        self._runs: dict[str, list[Any]] = {}
        self._report: Any = None

    def rehearse(self, folder: Path) -> None:
        """Opens, feeds and ends an offline run in `folder`.

        What wandb does once (0.5 s of imports and set-up) is done then, while the training process loads its programs
        and leaves a processor idle.
        """
        with contextlib.suppress(self._wandb.errors.Error, OSError):  # what is wrong will show when it counts
            self._mode, self._common = "offline", {"dir": str(folder)}
            self.arm("rehearsal", [{"id": "rehearsal", "name": "rehearsal"}], {"rehearsal": 0})
            self.log("rehearsal", 1, [{"rehearsal": 0.0}])
            self.arm_ends("rehearsal", [{"rehearsal": 0}])
        self._runs.clear()

    def begin(self, mode: str, common: dict[str, Any]) -> None:
        """`common` are arguments of `wandb.init` that all runs share."""
        self._mode, self._common = mode, common

    def prepare(self, run: dict[str, Any]) -> None:
        """Opens the W&B run of the report while there is time."""
        self._report = self._open(**run, job_type="report")

    def arm(self, name: str, runs: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Opens the runs of an arm, one a lane or one for all."""
        self._runs[name] = [self._open(**run, job_type=name) for run in runs]
        for run in self._runs[name]:
            run.define_metric("epoch", hidden=True)
            for metric, kept in SUMMARIES.items():
                run.define_metric(metric, step_metric="epoch", summary=f"{kept},last")
            run.summary.update(summary)

    def log(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        """The metrics of one epoch, a row a run."""
        for run, row in zip(self._runs[name], rows, strict=True):
            run.log({"epoch": step, **row}, step=step)

    def arm_ends(self, name: str, summaries: list[dict[str, Any]]) -> None:
        """What an arm came to, a row a run."""
        for run, summary in zip(self._runs.pop(name), summaries, strict=True):
            run.summary.update(summary)
            run.finish()

    def report(self, columns: list[str], rows: list[list[str]], figures: list[str]) -> None:
        """The table and the figures of the whole run, in a W&B run of their own."""
        images = {Path(figure).stem: self._wandb.Image(figure) for figure in figures}
        self._report.log({"results": self._wandb.Table(columns=[*columns], data=rows), **images})
        self._report.finish()
        self._report = None

    def end(self, status: int) -> None:
        """Closes what is still open; a status that is not 0 marks those runs as failed."""
        for run in filter(None, (*itertools.chain(*self._runs.values()), self._report)):
            run.finish(exit_code=status)

    def _open(self, **given: Any) -> Any:
        quiet: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "disable_code": True,
            "disable_git": True,
            "disable_job_creation": True,
            "save_code": False,
            "init_timeout": 8.0,
            "x_disable_machine_info": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }
        known = self._wandb.Settings.model_fields
        settings = {name: value for name, value in quiet.items() if name in known}
        arguments = {**self._common, **given, "reinit": "create_new", "resume": "allow"}
        try:
            return self._wandb.init(**arguments, mode=self._mode, settings=self._wandb.Settings(**settings))
        except self._wandb.errors.Error as error:
            if self._mode == "offline":
                raise
            self._mode = "offline"
            reason = " ".join(str(error).split())[:200]
            tell(f"W&B cannot be reached ({reason}): its copy is kept offline, for `wandb sync`")
            return self._open(**given)


def tell(text: str) -> None:
    """Something that the user should know, in one line, through the training process."""
    sys.__stdout__.write(json.dumps({"tell": text}) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def main(scratch: Path) -> int:
    """Reads lines until `end`, or until the training process is gone; `scratch` is what `TMPDIR` names."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the training process, which then ends the copy
    priority.lower(os.getpid())
    sys.stdout = sys.stderr  # what wandb prints is not for the training process
    ended = False
    try:
        copy = Copy()
        copy.rehearse(scratch)
        priority.lower(os.getpid())  # and wandb's own process, which runs by now
        for line in sys.stdin:
            what = json.loads(line)
            ended = what["do"] == "end"
            getattr(copy, what.pop("do"))(**what)
            if ended:
                break
        if not ended:  # killed, perhaps
            copy.end(status=1)
    except Exception as error:
        tell(f"W&B failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}): the run goes on without it")
        return 1
    return 0


if __name__ == "__main__":
    # wandb's own threads may hang: nothing of theirs is waited for.
    scratch = Path(sys.argv[1])
    status = main(scratch)
    sys.stderr.flush()
    shutil.rmtree(scratch, ignore_errors=True)  # the training process does so too, unless it was killed
    os._exit(status)
