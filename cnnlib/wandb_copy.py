"""A run's copy in Weights & Biases, from the side of the training process: what to send, and never to wait for it.

`metrics.jsonl` and `results.json` are the truth. The copy is made by a process of its own (`wandb_worker.py`), which
this one feeds through a pipe.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cnnlib import priority
from cnnlib.config import Experiment, LaneNumbers
from cnnlib.errors import UserError
from cnnlib.folder import inside
from cnnlib.report import COLUMNS, rows
from cnnlib.stats import mean_interval
from cnnlib.tracking import plain
from cnnlib.watcher import Beginning, EpochReport, Watcher

METRICS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
PATIENCE = 20.0
"""Seconds that the end of a run waits for W&B, whose servers may not answer."""
PATIENCE_OFFLINE = 120.0
"""The same where only the disk and a busy machine may keep it."""
MOST_WAITING = 10_000
"""Lines that may wait for the worker; W&B that takes no more loses the rest."""


def chosen_mode(asked: str) -> tuple[str | None, str | None]:
    """`online`, `offline` or None, for none; and, where `auto` makes none, how to have one.

    `auto` is what `WANDB_MODE` says, else online where there is a key. Raises UserError where what was asked for is not
    to be had.
    """
    wanted = asked
    if asked == "auto":
        wanted = {"offline": "offline", "online": "online", "disabled": "off"}.get(
            os.environ.get("WANDB_MODE", ""), "auto"
        )
    if wanted == "off":
        return None, None
    if importlib.util.find_spec("wandb") is None:
        if wanted == "auto":
            return None, "W&B is off: wandb is not installed (cnnlib's extra `wandb`)"
        raise UserError(f"--wandb {wanted} needs cnnlib's extra `wandb`: pip install -e '.[wandb]'")
    if wanted != "offline" and not has_key():
        if wanted == "auto":
            return None, "W&B is off: `wandb login` turns it on, --wandb offline keeps a copy on the disk"
        raise UserError("--wandb online needs a key: `wandb login`, or WANDB_API_KEY")
    return "offline" if wanted == "offline" else "online", None


def has_key() -> bool:
    """Whether wandb will find a key, where it looks for one: the environment, or an entry of the user's netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(RuntimeError):  # there is no home
            path = str(Path(path).expanduser())
        if Path(path).is_file():
            with contextlib.suppress(netrc.NetrcParseError, OSError):  # one that nobody can read holds no key
                return bool(host and netrc.netrc(str(path)).authenticators(host))
    return False


class WandbCopy(Watcher):
    """Tells a worker what happens. Nothing here waits, but `close`, which gives the worker some time to end."""

    def __init__(self, experiment: Experiment, mode: str) -> None:
        self._per, self._project = experiment.wandb.per, experiment.wandb.project
        self._mode, self._patience = mode, PATIENCE if mode == "online" else PATIENCE_OFFLINE
        self.tell_user: Callable[[str], None] = lambda text: None
        """How the user is told that something is wrong with W&B."""
        self._waiting: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._scratch = tempfile.TemporaryDirectory(prefix="cnnlib-wandb-", ignore_cleanup_errors=True)
        # A group of its own: Ctrl-C is for the training process, which then ends the copy in order.
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "cnnlib.wandb_worker", self._scratch.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            process_group=0,
            env={**os.environ, "TMPDIR": self._scratch.name},  # wandb leaves folders there when it is killed
        )
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._began = False
        self._told: list[str] = []
        self._open: set[str] = set()
        self._is_lost = self._is_prepared = self._has_told = False

    def run_begins(self, beginning: Beginning) -> None:
        """Says what all its W&B runs have in common."""
        inside(beginning.folder, beginning.folder / "wandb")
        self._beginning, self._began = beginning, True
        common = {
            "project": self._project,
            "group": f"{beginning.experiment} {beginning.folder.name} {beginning.identity}",
            "dir": str(beginning.folder.absolute()),
            "tags": [beginning.data[:64], beginning.platform],
        }
        self._send("begin", mode=self._mode, common=common)
        self._static = flat_config(beginning.config)

    def training_begins(self, name: str, epoch: int) -> None:
        """Opens the runs of an arm."""
        known, lanes = self._beginning.arms[name], self._beginning.lanes[name]
        counts = {key: known[key] for key in ("parameters", "connections", "macs")}
        config = {
            **flat_config(known["config"]),
            "experiment": self._beginning.experiment,
            "arm": name,
            "connectivity": known["connectivity"],
            "model": known["model"],
            **counts,
        }
        if self._per == "arm":
            columns = {key: [lane[key] for lane in lanes] for key in LaneNumbers._fields}
            varied = {key: values[0] if len(set(values)) == 1 else values for key, values in columns.items()}
            runs = [self._run(name, name, {**config, **varied})]
        else:
            runs = [
                self._run(f"{name}-{number}", lane_name(name, lane, lanes), {**config, **lane})
                for number, lane in enumerate(lanes)
            ]
        self._open.add(name)
        self._send("arm", name=name, runs=runs, summary=counts)
        if not self._is_prepared:
            report = self._run("report", f"{self._beginning.experiment} report", self._static)
            self._send("prepare", run=report)
            self._is_prepared = True

    def epoch_ends(self, report: EpochReport) -> None:
        """Sends the metrics of each lane, or their means with intervals."""
        if self._per == "arm":
            row: dict[str, Any] = {"lanes_ok": report.lanes - report.diverged}
            fine = [line for line in report.lines if line["status"] == "ok"]
            for metric in METRICS:
                if metric in report.lines[0]:
                    mean, low, high, _ = mean_interval([line[metric] for line in fine])
                    row |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
            table = [row]
        else:
            table = [
                {**{key: line[key] for key in METRICS if key in line}, "diverged": int(line["status"] != "ok")}
                for line in report.lines
            ]
        self._tell()
        self._send("log", name=report.arm, step=report.epoch, rows=[finite(row) for row in table])

    def arm_ends(self, name: str, result: dict[str, Any], epoch: int) -> None:
        """Sends what the arm came to; not of one that an earlier session finished."""
        if name not in self._open:
            return
        self._open.discard(name)
        if self._per == "arm":
            accuracy = result["test_accuracy"]
            low, high = accuracy["ci95"]
            found = {
                "test_accuracy": accuracy["mean"],
                "test_accuracy_low": low,
                "test_accuracy_high": high,
                "n": accuracy["n"],
            }
            summaries = [found | {"train_seconds_per_lane": result["train_seconds_per_lane"]}]
        else:
            keys = ("test_accuracy", "test_loss", "status", "parameters_sha256", "distance_from_conv", "sparsity")
            summaries = [{key: lane[key] for key in keys if key in lane} for lane in result["lanes"]]
        self._tell()
        self._send("arm_ends", name=name, summaries=[finite(row) for row in summaries])

    def run_ends(self, results: dict[str, Any]) -> None:
        """Sends the table and the figure, which lie in the folder by now."""
        folder = self._beginning.folder.absolute()
        figures = [str(path) for path in (folder / "accuracy.png",) if path.exists()]
        if not self._is_prepared:  # every arm was finished before
            return
        self._send("report", columns=list(COLUMNS), rows=[list(row) for row in rows(results)], figures=figures)

    def close(self, status: int) -> None:
        """Ends the copy; what W&B has not taken when its time is over stays in the run's folder, for `wandb sync`."""
        priority.lend(self._worker.pid)
        if not self._began:
            self._worker.kill()
        self._send("end", status=status)
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        try:
            self._worker.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            if self._began:
                folder = self._beginning.folder / "wandb"
                late = f"W&B did not end in {self._patience:.0f} s: its copy is not whole"
                self._told.append(f"{late}; `wandb sync` uploads what there is in {folder}")
        self._writer.join(1.0)
        self._reader.join(1.0)
        if not self._reader.is_alive() and self._worker.stdout is not None:
            self._worker.stdout.close()
        self._scratch.cleanup()
        self._tell()

    def _run(self, part: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
        return {"id": f"{self._beginning.identity}-{part}", "name": name, "config": plain(config)}

    def _send(self, do: str, **what: Any) -> None:
        try:
            self._waiting.put_nowait(json.dumps({"do": do, **what}) + "\n")
        except queue.Full:
            if not self._is_lost:
                self._told.append("W&B takes no more: its copy is not whole, metrics.jsonl is")
            self._is_lost = True

    def _write(self) -> None:
        stdin = self._worker.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # the worker is gone; what was wrong it has told
            while (line := self._waiting.get()) is not None:
                stdin.write(line)
                stdin.flush()
        with contextlib.suppress(OSError):  # closed even so: it tries what is buffered once more
            stdin.close()

    def _read(self) -> None:
        assert self._worker.stdout is not None
        for line in self._worker.stdout:
            with contextlib.suppress(ValueError):  # not from us: some library prints
                self._told.append(str(json.loads(line)["tell"]))

    def _tell(self) -> None:
        if self._told and not self._has_told:  # once: what follows is a consequence
            self._has_told = True
            self.tell_user(self._told[0])


def lane_name(arm: str, lane: dict[str, Any], lanes: Sequence[dict[str, Any]]) -> str:
    """`lenet5 seed 3`, and whatever else tells the lane from others: `lenet5 seed 3 learning_rate 0.01`."""
    same = {"seed"} | ({"order_seed"} if all(other["order_seed"] == other["seed"] for other in lanes) else set())
    varied = [key for key in lane if len({other[key] for other in lanes}) > 1 and key not in same]
    return " ".join([arm, f"seed {lane['seed']}", *(f"{key} {lane[key]:g}" for key in varied)])


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The static fields, by names without dots (`data_name`, `optim_schedule`); arms and traced fields aside."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= {f"{key}_{inner}": one for inner, one in value.items() if inner not in LaneNumbers._fields}
        elif key != "arms":
            found[key] = ",".join(map(str, value)) if isinstance(value, list) else value
    return found


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Without what is not known, such as the loss of a lane that has diverged."""
    return {key: value for key, value in plain(row).items() if value is not None}
