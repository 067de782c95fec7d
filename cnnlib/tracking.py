"""What a run writes: JSON lines and a log while it goes, whole files at its end, and where its code came from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

import cnnlib
from cnnlib.config import EXPERIMENTS, Experiment, Growth, assignments, kept_like, override
from cnnlib.errors import UserError
from cnnlib.fields import from_dict
from cnnlib.watcher import Beginning, EpochReport, Watcher


def plain(value: Any) -> Any:
    """A JSON-ready copy in which a number that is not finite is None, since JSON has no word for it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """Indented JSON, with a newline at its end."""
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path` and renames it, so that `path` is never seen half-written."""
    beside = path.with_name(f".{path.name}.part{path.suffix}")
    with cannot_write(path):
        try:
            beside.unlink(missing_ok=True)  # a link of that name would lead elsewhere
            write(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


class JsonLines:
    """A file of one JSON object a line, flushed whenever lines have been written."""

    def __init__(self, path: Path, lines: Sequence[dict[str, Any]] = ()) -> None:
        """Begins the file with these lines, whatever it held before; raises UserError where it cannot be written."""
        self._path = path
        with cannot_write(path):
            write_whole(path, lambda beside: beside.write_text(_json_lines(lines), encoding="utf-8"))
            self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds lines, together: whoever kills the process leaves all of them or, at worst, the last one cut off."""
        with cannot_write(self._path):
            self._file.write(_json_lines(lines))
            self._file.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take is still in the buffer, and told already
            self._file.close()


def _json_lines(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(plain(line), allow_nan=False) + "\n" for line in lines)


MOST_BYTES = 2**30


def read_regular(path: Path) -> str:
    """The text of a file that somebody else may have put there; raises OSError for what is no file, or a huge one."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise OSError(f"{path} is no file of at most {MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, as far as they are whole; none where there is no such file."""
    found: list[dict[str, Any]] = []
    try:
        text = read_regular(path)
    except (OSError, ValueError):  # nothing there, or nothing that can be read: nothing known
        return found
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # cut off by whoever killed the run
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def means_of(lines: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the mean and the standard deviation of each metric over the lanes that have not diverged."""
    fine = [line for line in lines if line["status"] == "ok"]
    found: dict[str, Any] = {"lanes_ok": len(fine)}
    for metric in metrics:
        values = [line[metric] for line in fine if line.get(metric) is not None]
        found[metric] = float(np.mean(values)) if values else None
        found[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def lane_name(arm: str, lane: dict[str, Any], lanes: Sequence[dict[str, Any]]) -> str:
    """Return `lenet5 seed 3`, with whatever else tells the lane from others: `lenet5 seed 3 learning_rate 0.01`."""
    same = {"seed"} | ({"order_seed"} if all(other["order_seed"] == other["seed"] for other in lanes) else set())
    varied = [key for key in lane if len({other[key] for other in lanes}) > 1 and key not in same]
    return " ".join([arm, f"seed {lane['seed']}", *(f"{key} {lane[key]:g}" for key in varied)])


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not known, such as the loss of a lane that has diverged."""
    return {key: value for key, value in plain(row).items() if value is not None}


def follow_json_lines(path: Path, begin: int, is_over: Callable[[], bool]) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of a file as they are written, from byte `begin` on, until `is_over` and all are read."""
    rest = b""
    with path.open("rb") as file:
        file.seek(begin)
        ends = False
        while not ends:
            ends = is_over()  # asked first: what is written by then is read
            *whole, rest = (rest + file.read()).split(b"\n")
            yield [json.loads(line) for line in whole]


@contextlib.contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turns what the system says of a file that it does not take into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


class Log(Watcher):
    """`log.txt`: what the user was told, each line with its time. Lines wait until the folder is known."""

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
            # Not through a link: the folder may be a stranger's, and the link lead anywhere.
            self._file = open(path, "a", encoding="utf-8", opener=_not_through_links)  # noqa: SIM115  # closed by close()
        if beginning.command:
            self._lines.insert(0, f"{now()} {beginning.command}\n")
        self.says("resumed" if beginning.is_resumed else "begun")

    def training_begins(self, name: str, epoch: int) -> None:
        self.says(f"{name}: trains" + (f", after epoch {epoch}" if epoch else ""))

    def epoch_ends(self, report: EpochReport) -> None:
        means = "  ".join(f"{key} {value:.6f}" for key, value in report.means.items())
        diverged = f"  {report.diverged} of {report.lanes} lanes diverged" if report.diverged else ""
        self.says(f"{report.arm}: epoch {report.epoch}/{report.epochs}  {means}{diverged}")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # told when it was written
                self._file.close()
            self._file = None


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


VARIABLES = (
    "CNNLIB_KERNELS",
    "CUDA_VISIBLE_DEVICES",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS",
    "TFDS_DATA_DIR",
    "XLA_FLAGS",
)
"""Variables of the environment that can change a result, and hold no secrets: no others are ever written down."""


@functools.cache  # it reads some hundred files, for a third of a second
def packages() -> dict[str, str]:
    """Return the installed packages and their versions, by name."""
    found = [distribution.metadata for distribution in metadata.distributions()]
    versions = {known["Name"]: known["Version"] for known in found if known["Name"]}
    return dict(sorted(versions.items(), key=lambda entry: entry[0].lower()))


def environment(command: str | None) -> dict[str, Any]:
    """Where a run happened, and the command that repeats it: `environment.json`."""
    import platform

    revision = commit()
    return {
        "command": command,
        "commit": revision,
        "diff": "git.diff" if (revision or "").endswith("-dirty") else None,
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": packages(),
    }


def command_for(name: str, experiment: Experiment | Growth) -> str | None:
    """What to type to run this again; None where it is not one of the registered experiments with fields replaced."""
    if name not in EXPERIMENTS:
        return None
    registered = EXPERIMENTS.get(name)
    if type(registered) is not type(experiment):
        return None
    known, wanted = assignments(registered), assignments(experiment)
    for overrides in ([text for text in wanted if text not in known], wanted):
        try:
            if override(registered, overrides) == experiment:
                return shlex.join(["python", "-m", "experiments", "run", name, *overrides])
        except UserError:  # such as a field of an arm that is not registered
            continue
    return None


def command_to_repeat(results: dict[str, Any]) -> str | None:
    """What to type for the numbers of `results.json` again, as this version would keep, follow and compare the run.

    None where that is no registered experiment with fields replaced. Raises UserError for a configuration that this
    version does not know.
    """
    name, experiment = results["experiment"], from_dict(results["config"], Experiment)
    registered = EXPERIMENTS.get(name) if name in EXPERIMENTS else None
    return command_for(name, kept_like(experiment, registered) if isinstance(registered, Experiment) else experiment)


def machine() -> dict[str, Any]:
    """The processor by its name and its number of cores, whatever device the models run on."""
    import platform

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # no Linux: the name above
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {"processor": name, "cores": os.cpu_count()}


def versions() -> dict[str, str]:
    """Versions of Python, of cnnlib and of the libraries that a result depends on."""
    import platform

    libraries = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"python": platform.python_version(), **libraries, "cnnlib": cnnlib.__version__}


def code_sha256() -> str:
    """SHA-256 of cnnlib's own sources, in the order of their names: what a result depends on, installed or in git."""
    digest = hashlib.sha256()
    folder = Path(cnnlib.__file__).parent
    for path in sorted((*folder.glob("*.py"), *folder.glob("*.cc"))):
        digest.update(f"{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    """What git says about cnnlib's own checkout; None outside one, and without git.

    The program of `core.fsmonitor` is not run: git's configuration may be somebody else's.
    """
    package = Path(cnnlib.__file__).parent
    command = ["git", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, cwd=package, capture_output=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of cnnlib's own checkout, with `-dirty` where tracked files differ from it; None outside git."""
    # An installed copy may lie inside somebody else's checkout: only a tracked file tells that this one is ours.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision.strip() + (
        "-dirty" if (_git("status", "--porcelain", "--untracked-files=no") or "").strip() else ""
    )


def diff() -> str:
    """How tracked files of cnnlib's own checkout differ from its commit, by git itself and without colours."""
    return _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") or ""
