"""Copy a run to Weights & Biases (W&B) from the run's files. Only this file imports wandb.

The files `metrics.jsonl` and `results.json` are the source of truth. During training, a separate process
(`python -m cnnlib.tracking.wandb_copy`) reads them and feeds W&B. If W&B hangs, fails or dies, the run goes on.
`cnnlib wandb DIR` sends a run later, with the same code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import netrc
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cnnlib.config.fields import from_dict
from cnnlib.config.schema import Experiment
from cnnlib.errors import UserError
from cnnlib.report.summary import COLUMNS, rows
from cnnlib.runs.callbacks import Beginning, Watcher
from cnnlib.runs.folder import ARMS, inside
from cnnlib.runs.metrics import MetricsLine, lane_name, means_of, parse_line
from cnnlib.runs.record import read_record
from cnnlib.runs.results import ArmResult, results_in
from cnnlib.system.files import finite, follow_json_lines, plain, read_json

RESULTS = ("test_accuracy", "test_loss", "status", "parameters_sha256", "distance_from_conv", "sparsity")
"""Results of a lane that are copied to W&B."""
SUMMARIES = {"train_loss": "min", "train_accuracy": "max", "validation_loss": "min", "validation_accuracy": "max"}
"""For each metric of a lane (a model of an arm): the summary that W&B keeps in addition to the last value."""
PATIENCE = {"online": 20.0, "offline": 120.0}
"""Seconds that a run waits for W&B at its end. Online, servers may not answer; offline, a busy machine may be slow."""
LOOK = 0.5
"""Seconds between two reads of `metrics.jsonl`."""
QUIET = ("disable_code", "disable_git", "disable_job_creation", "x_disable_machine_info", "x_disable_meta")
SETTINGS: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": 8.0, "x_save_requirements": False}
SETTINGS |= dict.fromkeys((*QUIET, "x_disable_stats"), True)
"""Settings of wandb. The copy holds what the run's files hold, and nothing about the machine."""


def chosen_mode(asked: str) -> tuple[str | None, str | None]:
    """Return the mode (`online`, `offline`, or None for no copy) and a hint for the user.

    There is a hint if `auto` makes no copy because wandb or its key is missing; otherwise the hint is None.

    `auto` follows the environment variable `WANDB_MODE` if it is set. Without `WANDB_MODE`, `auto` is online if there
    is a key. Raise UserError if the mode `asked` is impossible.
    """
    modes = {"offline": "offline", "online": "online", "disabled": "off"}
    wanted = modes.get(os.environ.get("WANDB_MODE", ""), "auto") if asked == "auto" else asked
    if wanted in ("off", "offline") and (wanted == "off" or importlib.util.find_spec("wandb")):
        return (None, None) if wanted == "off" else ("offline", None)
    if importlib.util.find_spec("wandb") is None:
        refusal = f"--wandb {wanted} needs cnnlib's extra `wandb`: pip install -e '.[wandb]'"
        hint = "W&B is off: wandb is not installed (cnnlib's extra `wandb`)"
    elif has_key():
        return "online", None
    else:
        refusal = "--wandb online needs a key: `wandb login`, or WANDB_API_KEY"
        hint = "W&B is off: `wandb login` turns it on, --wandb offline keeps a copy on the disk"
    if wanted == "auto":
        return None, hint
    raise UserError(refusal)


def has_key() -> bool:
    """Return whether wandb will find an API key in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(RuntimeError, netrc.NetrcParseError, OSError):  # no home, no such file, or unreadable
            return bool(netrc.netrc(str(Path(path).expanduser())).authenticators(host))
    return False


class WandbCopy(Watcher):
    """Start the process that copies a run. At the end of the run, wait for this process up to `PATIENCE`."""

    def __init__(self, mode: str, tell_user: Callable[[str], None]) -> None:
        self._mode, self._tell = mode, tell_user
        self._process: subprocess.Popen[str] | None = None

    def run_begins(self, beginning: Beginning) -> None:
        """Start the copying process. For a resumed run, the process copies only new metrics."""
        inside(beginning.folder, beginning.folder / "wandb")
        self._again = f"to send the run again: cnnlib wandb {shlex.quote(str(beginning.folder))}"
        begin = (beginning.folder / "metrics.jsonl").stat().st_size if beginning.is_resumed else 0
        self._scratch = tempfile.TemporaryDirectory(prefix="cnnlib-wandb-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cnnlib.tracking.wandb_copy", str(beginning.folder), self._mode, str(begin)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,  # Ctrl-C must reach the training process only, which then ends the copy
            env={**os.environ, "TMPDIR": self._scratch.name},  # wandb leaves files here if it is killed
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self._tell(line.strip())
        if process.wait() > 0:
            self._tell(self._again)

    def close(self, status: int) -> None:
        """Let the copy finish. If W&B is too slow, the user can send the run again later from its files."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):  # the process has died and has printed why
            assert self._process.stdin is not None
            self._process.stdin.write(str(status))
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE[self._mode])
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._tell(f"W&B did not end in {PATIENCE[self._mode]:.0f} s; {self._again}")
        self._reader.join(1.0)
        self._scratch.cleanup()


def send(folder: Path, mode: str, batches: Iterator[Sequence[MetricsLine]], status: Callable[[], int]) -> None:
    """Copy a run to W&B: first its metrics and results, then its exit status.

    `batches` yields lines of `metrics.jsonl`. Each batch holds whole epochs.
    """
    copy = _Copy(folder, mode)
    for batch in batches:
        for _, lines in itertools.groupby(batch, lambda line: (line.arm, line.epoch)):
            copy.log(list(lines))
        copy.finish_arms()
    copy.end(status())


class _Copy:
    """The W&B runs of a folder: one per lane, and one for the group. The group's run has the means over each arm's
    lanes."""

    def __init__(self, folder: Path, mode: str) -> None:
        import wandb

        self._library, self._folder, self._mode = wandb, folder, mode
        self._record, config = read_record(folder), read_json(folder / "config.json")
        experiment = from_dict({key: value for key, value in config.items() if key != "experiment"}, Experiment)
        self._fields, self._runs = experiment.wandb, dict[str, list[Any]]()
        self._group = self._open(
            "group", f"{self._record.experiment} group", "group", plain({**config, "arms": len(config["arms"])})
        )

    def log(self, lines: Sequence[MetricsLine]) -> None:
        """Log one epoch of an arm: the metrics of each lane, and their means over lanes."""
        arm, epoch = lines[0].arm, lines[0].epoch
        if arm not in self._runs:
            self._group.define_metric(f"{arm}/*", step_metric=f"{arm}/epoch")
            wandb = self._fields
            self._runs[arm] = list(self._open_lanes(arm, lines)) if wandb.per == "lane" else []
        for run, line in zip(self._runs[arm], lines, strict=False):
            row = {key: getattr(line, key) for key in SUMMARIES}
            run.log(finite({"epoch": epoch, **row, "diverged": int(line.status != "ok")}), step=epoch)
        means = {"epoch": epoch, **means_of(lines, tuple(SUMMARIES))}
        self._group.log(finite({f"{arm}/{key}": value for key, value in means.items()}))

    def _open_lanes(self, arm: str, lines: Sequence[MetricsLine]) -> Iterator[Any]:
        known = self._record.arms[arm]
        counts = {"parameters": known.parameters, "connections": known.connections, "macs": known.macs}
        shared = {"experiment": self._record.experiment, "arm": arm, "connectivity": known.connectivity}
        config = {**known.config, **shared, "model": known.model, **counts}
        lanes = [line.numbers for line in lines]
        for number, lane in enumerate(lanes):
            run = self._open(f"{arm}-{number}", lane_name(arm, lane, lanes), arm, {**config, **lane._asdict()})
            run.define_metric("epoch", hidden=True)
            for metric, kept in SUMMARIES.items():
                run.define_metric(metric, step_metric="epoch", summary=f"{kept},last")
            run.summary.update(counts)
            yield run

    def finish_arms(self) -> None:
        """Write the results of arms whose result file exists, and close their W&B runs."""
        for arm in list(self._runs):
            if not isinstance(found := read_json(self._folder / ARMS / f"{arm}.json"), dict):
                continue
            result: ArmResult = from_dict(found["result"], ArmResult, arm)
            means = means_of(result.lanes, ("test_accuracy", "test_loss"))
            self._group.summary.update(finite({f"{arm}/{key}": value for key, value in means.items()}))
            for run, lane in zip(self._runs.pop(arm), result.lanes, strict=False):
                if result.chosen_setting is not None:
                    run.config.update({"chosen": lane.setting == result.settings[result.chosen_setting].setting})
                run.summary.update(finite({key: getattr(lane, key) for key in RESULTS}))
                run.finish()

    def end(self, status: int) -> None:
        """Close all W&B runs that are still open. A nonzero `status` marks them as failed."""
        self.finish_arms()
        for run in itertools.chain(*self._runs.values()):
            run.finish(exit_code=status)
        if status == 0 and (results := results_in(self._folder)) is not None:
            table = self._library.Table(columns=[*COLUMNS], data=rows(results))
            figure = self._folder / "accuracy.png"
            figures = {"accuracy": self._library.Image(str(figure))} if figure.exists() else {}
            self._group.log({"results": table, **figures})
        self._group.finish(exit_code=status)
        if self._mode == "offline":
            where = f"{shlex.quote(str(self._folder / 'wandb'))}/offline-run-*"
            sys.stdout.write(f"W&B: the copy is on the disk; to upload it: wandb sync {where}\n")

    def _open(self, part: str, name: str, job_type: str, config: dict[str, Any]) -> Any:
        wandb, identity = self._fields, self._record.id
        known = {name: value for name, value in SETTINGS.items() if name in self._library.Settings.model_fields}
        return self._library.init(
            entity=wandb.entity,
            project=wandb.project,
            notes=wandb.notes or None,
            tags=[*self._record.tags, *wandb.tags],
            group=f"{self._record.experiment} {self._folder.name} {identity}",
            job_type=job_type,
            id=f"{identity}-{part}",
            name=name,
            config=config,
            dir=str(self._folder.absolute()),
            mode=self._mode,  # type: ignore[arg-type]
            reinit="create_new",
            resume="allow",
            settings=self._library.Settings(**known),
        )


def main(folder: str, mode: str, begin: str) -> int:
    """Copy a run while it trains. Stop when standard input delivers the exit status of the run, or is closed.

    Standard input is closed without a status if the run has died.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # only the training process handles signals; it ends the copy
    os.nice(19)  # training has priority
    is_over = lambda: bool(select.select([sys.stdin], [], [], LOOK)[0])  # noqa: E731
    objects = follow_json_lines(Path(folder, "metrics.jsonl"), int(begin), is_over)
    batches = ([parse_line(one) for one in batch] for batch in objects)
    try:
        send(Path(folder), mode, batches, lambda: int(sys.stdin.read() or 1))
    except Exception as error:
        sys.stdout.write(f"W&B failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})\n")
        return 1
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # do not wait for wandb's own threads, which may hang
