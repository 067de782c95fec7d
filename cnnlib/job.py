"""One job of an experiment that is trained as several: `python -m cnnlib.job`, and what starts it and holds it.

It reads what it is to do as one line of JSON from standard input, and tells how it goes as lines of JSON on standard
output; other output goes to standard error. The open end of its standard input is its owner's life: where the owner
dies, in whatever way, the pipe ends, and so does the job, at once. SIGINT or SIGTERM once: the epoch is finished and
saved. What is imported before it is known what to do is little: JAX is imported here, and not by who holds a job.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from cnnlib import stopping
from cnnlib.errors import Stopped, UserError
from cnnlib.priority import children
from cnnlib.watcher import Beginning, EpochReport, Watcher

if TYPE_CHECKING:
    from cnnlib.resolve import Part

LOCK_PATIENCE = 60.0
"""Seconds that a process of the same job, which has lost its owner, may take to be gone."""
LOOK = 1.0
"""Seconds between two looks at a job's memory, of which the system keeps the peak; each takes a millisecond."""
ORPHANED = 70
"""Exit status of a job whose owner is gone."""
EVENTS, ERRORS = ".events", ".stderr"
"""Ends of the names of the files beside a job's folder that take its two outputs."""


class Task(NamedTuple):
    """What a job is to do; as JSON it has these names."""

    does: str
    """`identify`: look at the whole experiment, and train nothing. `train`: its part. `finish`: write the results of a
    run whose arms are all finished."""
    name: str
    experiment: dict[str, Any]
    """As `fields.to_dict` has it, with the job's own number of devices."""
    folder: str
    """Of the job, or of the run; absolute."""
    cores: int | None = None
    """Of a CPU, each a device; None: all."""
    arm: str | None = None
    seeds: Sequence[int] | None = None
    """None: all of the arm."""
    resume: bool = True
    force: bool = False
    expected: dict[str, Any] | None = None
    """The identity that a job of this part must have."""
    check: bool = True
    """Whether to check the backend before training."""


class Ending(NamedTuple):
    """How a job ended."""

    status: int
    """0; 2 for a mistake of the user; 130 or 143 where it was asked to stop; negative: the signal that it died of."""
    text: str
    value: Any = None

    @property
    def is_death(self) -> bool:
        """Whether it ended without a word of its own, or by a signal that its owner did not send."""
        return self.status < 0 or self.status == ORPHANED or self.status > 128


class Process:
    """A running job. It does not outlive this process."""

    def __init__(self, task: dict[str, Any], place: Path | None, environment: dict[str, str] | None = None) -> None:
        """Starts it; what it tells goes to files beside `place`, None: to temporary ones."""
        with contextlib.ExitStack() as stack:
            self._events: IO[bytes] = stack.enter_context(_output(place, EVENTS))
            self._errors: IO[bytes] = stack.enter_context(_output(place, ERRORS))
            self._begin = self._events.seek(0, os.SEEK_END)
            root = str(Path(__file__).parents[1])
            inherited = dict(os.environ if environment is None else environment)
            path = os.pathsep.join(filter(None, (root, inherited.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cnnlib.job"],
                stdin=subprocess.PIPE,
                stdout=self._events,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for its owner, who then asks it to stop
                env={**inherited, "PYTHONPATH": path},
            )
            stdin = self._process.stdin
            assert stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its ending tells
                stdin.write(json.dumps(task).encode() + b"\n")
                stdin.flush()
            self._files = stack.pop_all()
        self._looked_at = -LOOK
        self.peak_bytes = 0
        """The most memory that it, and the processes that it has started, have been seen to take."""

    def ending(self) -> Ending | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            if time.monotonic() >= self._looked_at + LOOK:
                self._looked_at = time.monotonic()
                family = (self._process.pid, *children(self._process.pid))
                self.peak_bytes = max(self.peak_bytes, sum(map(peak_of, family)))
            return None
        self._events.seek(self._begin)
        told = [event for event in parsed(self._events.read()) if event.get("event") == "ended"]
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        if told:
            return Ending(status, str(told[-1]["text"]), told[-1]["value"])
        if status < 0:
            return Ending(status, f"killed by {signal.Signals(-status).name}")
        return Ending(status, f"ended with status {status} and without a word" + (f": {lines[-1]}" if lines else ""))

    def stop(self) -> None:
        """Asks it to save what it has at the end of its epoch, and to end."""
        self._process.terminate()

    def close(self) -> None:
        """Ends it at once, where it lives."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # what it has not read
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._files.close()


def _output(place: Path | None, end: str) -> IO[bytes]:
    if place is None:
        return tempfile.TemporaryFile()
    path = beside(place, end)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "r+b")


def beside(place: Path, end: str) -> Path:
    """The file beside a job's folder that takes one of its outputs."""
    return place.with_name(place.name + end)


def peak_of(pid: int) -> int:
    """Bytes of memory that a process has had at most, as Linux tells; 0 elsewhere, and for one that is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return 0


def parsed(content: bytes) -> Iterator[dict[str, Any]]:
    """The objects in lines of JSON; a line that is cut off, or is none of ours, has none."""
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


class Teller(Watcher):
    """Tells a job's owner how it goes: a line of JSON an event."""

    def __init__(self, descriptor: int, task: Task) -> None:
        self._descriptor, self._task = descriptor, task

    def tell(self, event: str, **what: Any) -> None:
        """Writes one event."""
        line = json.dumps({"event": event, **what}).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def says(self, text: str) -> None:
        """As it is."""
        self.tell("says", text=text)

    def arm_begins(self, name: str, lanes: int, epochs: int) -> None:
        """How much there is to do."""
        self.tell("arm_begins", lanes=lanes, epochs=epochs)

    def run_begins(self, beginning: Beginning) -> None:
        """Raises UserError where this host, with what is installed on it, would not compute what the run began with."""
        if self._task.expected is None:
            return
        from cnnlib.folder import RECORD, read_json
        from cnnlib.resume import differences

        found = differences(self._task.expected, read_json(beginning.folder / RECORD)["identity"])
        if found.refused and not self._task.force:
            changed = "; ".join(found.refused)
            raise UserError(f"on {platform.node()} a job would not compute what the run began with: {changed}")
        for text in (*found.refused, *found.told):
            if not text.startswith("devices "):  # as many as its part has lanes for
                self.says(f"on {platform.node()}: {text}")

    def training_begins(self, name: str, epoch: int) -> None:
        """From where."""
        self.tell("training_begins", epoch=epoch, host=platform.node())

    def epoch_ends(self, report: EpochReport) -> None:
        """All but the lines, which are in the job's folder."""
        self.tell("epoch_ends", report=report._replace(lines=[])._asdict())


def end_with_owner() -> None:
    """Ends this process when standard input does."""
    while os.read(0, 4096):
        pass
    os._exit(ORPHANED)


def wait_for(folder: Path) -> None:
    """Waits until nobody else has the folder, for as long as one that has lost its owner may take to be gone."""
    from cnnlib.folder import is_locked

    until = time.monotonic() + LOCK_PATIENCE
    while is_locked(folder) and time.monotonic() < until:
        time.sleep(0.1)


def part_of(task: Task) -> Part | None:
    """What is trained of the experiment; None: all of it."""
    from cnnlib.resolve import Part

    return None if task.arm is None else Part(task.arm, None if task.seeds is None else tuple(task.seeds))


def do(task: Task, teller: Teller, wish: stopping.Wish) -> Any:
    """Does what the job is for; raises UserError and Stopped."""
    folder, watchers = Path(task.folder), list[Watcher]((teller,))
    how: dict[str, Any] = {}
    import experiments  # noqa: F401  # registers every experiment: a run's record has the command that repeats it
    from cnnlib.config import Experiment
    from cnnlib.fields import from_dict
    from cnnlib.mesh import use_cores
    from cnnlib.run import run
    from cnnlib.watcher import Watchers

    if task.expected is not None:
        how["streamed"] = task.expected["settings"]["streamed"]
    if task.does == "identify":
        how["identifies"] = True
    elif task.does == "finish":
        from cnnlib.plan import RateKeeper
        from cnnlib.report import ReportWriter

        watchers += [ReportWriter(folder), RateKeeper()]
        how["resume"] = True
    else:
        wait_for(folder)
        how |= {"resume": task.resume and os.path.lexists(folder / "run.json"), "part": part_of(task)}
    experiment = from_dict(task.experiment, Experiment)
    use_cores(task.cores)
    how |= {"force": task.force, "check": task.check, "stop": wish.is_made}
    found = run(experiment, task.name, folder, Watchers(watchers), **how)
    return found if task.does == "identify" else None


def main() -> int:
    """Does what standard input says; returns the exit status."""
    line = sys.stdin.buffer.readline()
    if not line:
        sys.stderr.write("error: `python -m experiments run NAME --executor local` starts jobs, and says what to do\n")
        return 2
    task = Task(**json.loads(line))
    threading.Thread(target=end_with_owner, daemon=True).start()
    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no event
    teller, status, text, value = Teller(stdout, task), 0, "", None
    with stopping.by_signal() as wish:
        teller.tell("begins", host=platform.node(), pid=os.getpid())
        try:
            value = do(task, teller, wish)
        except Stopped as stopped:
            status, text = 128 + (wish.signal or signal.SIGTERM), str(stopped)
        except UserError as error:
            status, text = 2, " ".join(str(error).split())
        except Exception as error:
            traceback.print_exc()
            status, text = 1, f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        teller.tell("ended", status=status, text=text, value=value)
    return status


if __name__ == "__main__":
    os._exit(main())  # without the time that JAX takes to be torn down, and its threads to notice
