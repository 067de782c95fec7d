"""`cnnlib run`, `merge` and `all`: train experiments."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cnnlib.cli.declarations import add_experiment, experiment_of, print_growth
from cnnlib.config.schema import EXPERIMENTS, Experiment, Growth
from cnnlib.errors import Stopped, UserError
from cnnlib.system import signals

if TYPE_CHECKING:
    from cnnlib.launch.jobs import Launch
    from cnnlib.runs.callbacks import Watcher
    from cnnlib.runs.merged import Merged
    from cnnlib.train.multihost import Hosts

WANDB_MODES = ("auto", "online", "offline", "off")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    add_experiment(parser)
    parser.add_argument(
        "--wandb", choices=WANDB_MODES, default="auto", help="copy the run to Weights & Biases (default: auto)"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--no-check", action="store_true", help="do not check the backend first")
    parser.add_argument(
        "--profile", action="store_true", help="write a profiler trace of one epoch per arm; that epoch is slower"
    )
    parser.add_argument("--force", action="store_true", help="resume even if the results will not be comparable")
    parser.add_argument(
        "--distributed", action="store_true", help="train together with the same command on other hosts"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    parser.add_argument("--processes", metavar="N", type=int, help="number of processes, one per host")
    parser.add_argument("--process-id", metavar="I", type=int, help="number of this process, starting at 0")
    parser.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=int,
        help="seconds after which a silent host counts as dead (default: 20)",
    )
    parser.add_argument(
        "--part", metavar="PART", help="train only one arm (ARM), or only some of its seeds (ARM-FIRST..LAST)"
    )
    parser.add_argument(
        "--executor", choices=("local", "slurm", "ray"), help="divide the run into jobs and run them here"
    )
    parser.add_argument("--seeds-per-job", metavar="N", type=int, help="seeds of an arm per job (default: all)")
    parser.add_argument(
        "--jobs-at-a-time",
        metavar="N",
        type=int,
        help="jobs that run at the same time, local and slurm (default: as many as fit)",
    )
    parser.add_argument("--retries", metavar="N", type=int, help="how often a killed job is started again (default: 3)")
    parser.add_argument("--gpus-per-job", metavar="N", type=int, help="GPUs per job, slurm and ray")
    parser.add_argument(
        "--slurm", metavar="OPTION=VALUE", action="append", help="option of sbatch, such as time=04:00:00"
    )
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="address of a Ray cluster (default: RAY_ADDRESS, or start one here)"
    )
    parser.add_argument("--resources", metavar="NAME=N", action="append", help="Ray resources per job, such as TPU=4")


def command_run(options: argparse.Namespace) -> int:
    """Train an experiment in this process, together with processes on other hosts, or as jobs."""
    if options.out == "":
        raise UserError("--out needs a folder")
    if options.force and not options.resume:
        raise UserError("--force has no meaning without --resume")
    experiment = experiment_of(options)
    out = Path(options.out or Path("runs", options.name))
    if isinstance(experiment, Growth) and (asked := given(options, ("executor", *JOB_OPTIONS))):
        raise UserError(f"{options.name} trains nothing: {asked[0]} has no meaning for it")
    launch = jobs_asked(options)
    if options.part is not None and (launch is not None or options.distributed or isinstance(experiment, Growth)):
        raise UserError("--part is for a job: it has no meaning with --executor or --distributed")
    for option in ("profile", "tensorboard"):
        if getattr(options, option) and (launch is not None or isinstance(experiment, Growth)):
            raise UserError(f"--{option} is for a run that trains in this process: leave out --executor")
    if isinstance(experiment, Growth):
        is_joined = options.distributed or bool(given(options, JOIN_OPTIONS))
        if options.resume or options.wandb in ("online", "offline") or is_joined:
            raise UserError(f"{options.name} trains nothing: only FIELD=VALUE and --out have a meaning for it")
        count_growth(options.name, experiment, out)
    elif launch is not None:
        return train_jobs(options.name, experiment, out, options, launch)
    else:
        return train_here(options.name, experiment, out, options)
    return 0


def count_growth(name: str, growth: Growth, out: Path) -> None:
    """Count an experiment that trains nothing, and write the counts."""
    from cnnlib.report.growth import run_growth
    from cnnlib.runs.folder import GROWTH_FILES

    results, earlier = run_growth(growth, name, out)
    if earlier is not None:
        print(f"the files of an earlier run moved to {earlier}")
    print_growth(results)
    print(f"written to {out}: {', '.join(GROWTH_FILES)}")


def train_here(name: str, experiment: Experiment, out: Path, options: argparse.Namespace) -> int:
    """Train. With `--distributed`, this process is one of several; process 0 prints progress and writes results."""
    from cnnlib.train import multihost

    joins = [getattr(options, option) for option in JOIN_OPTIONS]
    cluster = multihost.asked(options.distributed, *joins)
    if cluster is None:
        return trained(name, experiment, out, options)

    from cnnlib.train.sharding import use_cores

    use_cores(experiment.devices)
    with multihost.join(cluster) as joined:
        does = trained if joined.is_first else followed
        return does(name, experiment, out, options, joined)


JOIN_OPTIONS = ("coordinator", "processes", "process_id", "heartbeat")
JOB_OPTIONS = ("seeds_per_job", "jobs_at_a_time", "retries", "ray_address", "gpus_per_job", "resources", "slurm")


def jobs_asked(options: argparse.Namespace) -> Launch | None:
    """Return how to divide the experiment into jobs; None: no jobs. Raise UserError if the options are invalid."""
    if options.executor is None:
        if asked := given(options, JOB_OPTIONS):
            raise UserError(f"{asked[0]} has no meaning without --executor")
        return None
    if options.distributed or given(options, JOIN_OPTIONS):
        raise UserError("--executor and --distributed are two ways to use several processes: choose one")
    from cnnlib.launch.jobs import Launch

    found = {name: getattr(options, name) for name in JOB_OPTIONS if getattr(options, name) is not None}
    for text in found.pop("resources", []):
        key, _, number = text.partition("=")
        if not key or not number.isdecimal():
            raise UserError(f"--resources {text}: expected NAME=N, such as TPU=4")
        found.setdefault("resources", {})[key] = float(number)
    return Launch(options.executor, **found).checked()


def given(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return the options in `names` that the user gave, written as command-line arguments."""
    return [
        text
        for name in names
        if (value := getattr(options, name)) is not None
        for one in (value if isinstance(value, list) else [value])
        for text in (f"--{name.replace('_', '-')}", str(one))
    ]


def followed(name: str, experiment: Experiment, out: Path, options: argparse.Namespace, joined: Hosts) -> int:
    """Train as a process other than process 0 of a run on several hosts. First print one line that says so."""
    from cnnlib.runs.callbacks import Watcher
    from cnnlib.runs.runner import run
    from cnnlib.runs.session import Options

    print(f"process {joined.process} of {joined.count} trains {name}; process 0 tells and writes", flush=True)
    with signals.by_signal() as wish:
        try:
            how = Options(options.resume, options.force, not options.no_check)
            run(experiment, name, out, Watcher(), how, wish.is_made, joined)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return 128 + (wish.signal or signal.SIGTERM)
    return 0


def trained(
    name: str,
    experiment: Experiment,
    out: Path,
    options: argparse.Namespace,
    joined: Hosts | None = None,
    merged: Merged | None = None,
) -> int:
    """Train, or merge what jobs have trained. Write and print the results, and return the exit status."""
    from cnnlib.tracking.wandb_copy import chosen_mode

    mode, hint = chosen_mode(options.wandb)  # reject an impossible mode before JAX is imported

    from cnnlib.config.resolve import Part
    from cnnlib.report.summary import print_results
    from cnnlib.runs.callbacks import Watchers
    from cnnlib.runs.folder import RUN_FILES
    from cnnlib.runs.runner import run
    from cnnlib.runs.session import Options
    from cnnlib.runs.terminal import RunConsole, watcher_for
    from cnnlib.train.multihost import ALONE
    from cnnlib.train.sharding import use_cores

    use_cores(experiment.devices)
    console = RunConsole()
    part = None if merged is not None or options.part is None else Part.named(options.part)
    how = Options(options.resume, options.force, not options.no_check, options.profile, part=part, merged=merged)
    with signals.by_signal() as wish:
        try:
            with watcher_for(console) as shown, contextlib.ExitStack() as ends:
                watchers = [shown, *watchers_for(options, out, part is None, ends, shown.says, mode, hint)]
                results = run(experiment, name, out, Watchers(watchers), how, wish.is_made, joined or ALONE)
        except Stopped as stopped:
            print(how_to_go_on(stopped, name, options), file=sys.stderr)
            return 128 + (wish.signal or signal.SIGTERM)
    if part is None:
        print_results(results, console)
        console.print(f"written to {out}: {', '.join(RUN_FILES)}", markup=False, highlight=False, soft_wrap=True)
    return 0


def watchers_for(
    options: argparse.Namespace,
    out: Path,
    is_whole: bool,
    ends: contextlib.ExitStack,
    says: Callable[[str], None],
    mode: str | None,
    hint: str | None,
) -> list[Watcher]:
    """Return the requested callbacks, except the callback of the terminal. `ends` closes the callbacks.

    `is_whole` is false for a part of a run, which gets no report. `mode` is the W&B mode; None: no copy for W&B. `hint`
    says why W&B is off.
    """
    from cnnlib.report.summary import ReportWriter
    from cnnlib.runs.callbacks import Notice
    from cnnlib.runs.plan import RateKeeper
    from cnnlib.tracking.tensorboard import TensorBoard
    from cnnlib.tracking.wandb_copy import WandbCopy

    watchers: list[Watcher] = [ReportWriter(out), RateKeeper()] if is_whole else []
    if hint is not None:
        watchers.append(Notice(hint, says))
    if options.tensorboard:
        scalars = TensorBoard()
        ends.callback(scalars.close)
        watchers.append(scalars)
    if mode is not None:
        copy = WandbCopy(mode, says)
        ends.push(lambda kind, *_: copy.close(0 if kind is None else 1))
        watchers.append(copy)
    return watchers


def how_to_go_on(stopped: Stopped, name: str, options: argparse.Namespace) -> str:
    """Return the last line that a stopped run prints. The line has the command that resumes the run."""
    command = ["cnnlib", "run", name, *options.overrides]
    command += [] if options.out is None else ["--out", options.out]
    command += [] if options.wandb == "auto" else ["--wandb", options.wandb]
    command += ["--no-check"] if options.no_check else []
    command += ["--profile"] if options.profile else []
    command += ["--tensorboard"] if options.tensorboard else []
    command += given(options, ("part", "executor", *JOB_OPTIONS))
    where = ""
    if options.distributed:
        command += ["--distributed", *given(options, JOIN_OPTIONS)]
        where = ", each host with its own --process-id," if options.process_id is not None else ", on all hosts,"
    return f"{stopped}; go on{where} with: {shlex.join([*command, '--resume'])}"


def train_jobs(name: str, experiment: Experiment, out: Path, options: argparse.Namespace, launch: Launch) -> int:
    """Train as jobs. Then merge the results of the jobs, unless Slurm runs the jobs: its last job merges them."""
    from cnnlib.launch.merge import read_jobs
    from cnnlib.launch.start import start
    from cnnlib.runs.folder import state
    from cnnlib.runs.terminal import RunConsole, watcher_for
    from cnnlib.tracking.wandb_copy import chosen_mode

    chosen_mode(options.wandb)  # reject an impossible mode before anything trains
    if options.resume and state(out) == "finished":
        return trained(name, experiment, out, options)
    merge = given(options, ["wandb"]) + (["--force"] if options.force else [])
    run = [f"--{option.replace('_', '-')}" for option in ("no_check", "force") if getattr(options, option)]
    with signals.by_signal() as wish, watcher_for(RunConsole()) as shown:
        command, more = [name, *options.overrides], {"run": run, "merge": merge}
        try:
            is_finished = start(experiment, command, out, launch, more, options.resume, wish.is_made, shown.says)
        except Stopped as stopped:
            print(how_to_go_on(stopped, name, options), file=sys.stderr)
            return 128 + (wish.signal or signal.SIGTERM)
    return merged(read_jobs(out), out, options) if is_finished else 0


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `merge`."""
    parser.add_argument("folder", metavar="DIR", help="folder of a run whose jobs are finished")
    parser.add_argument("--force", action="store_true", help="merge jobs even if their results are not comparable")
    parser.add_argument(
        "--wandb", choices=WANDB_MODES, default="auto", help="copy the run to Weights & Biases (default: auto)"
    )


def command_merge(options: argparse.Namespace) -> int:
    """Merge the finished jobs of a run."""
    from cnnlib.launch.merge import read_jobs

    out = Path(options.folder)
    return merged(read_jobs(out), out, options)


def merged(jobs: Merged, out: Path, options: argparse.Namespace) -> int:
    """Combine the results of a run's jobs into the results of the run, and write them."""
    options.resume = options.no_check = options.profile = options.tensorboard = False
    return trained(jobs.name, jobs.experiment, out, options, merged=jobs)


def add_all(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `all`."""
    parser.add_argument(
        "--out", metavar="DIR", default="runs", help="folder that gets one folder per run (default: runs)"
    )


def command_all(options: argparse.Namespace) -> int:
    """Run or resume every experiment, each in its own process. Return the highest exit status."""
    worst = 0
    for name in EXPERIMENTS:
        place = Path(options.out) / name
        resume = [] if isinstance(EXPERIMENTS.get(name), Growth) else ["--resume"]
        command = ["run", name, "--out", str(place), *resume]
        print(f"cnnlib {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "cnnlib", *command], check=False).returncode
        if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return status
        worst = max(worst, status)
    return worst
