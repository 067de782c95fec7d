"""The command line: `python -m experiments COMMAND`, such as `list`, `run NAME` and `compare DIR DIR`.

Nothing here imports JAX until an experiment is run. Whatever the user got wrong is one line on standard error and exit
status 2; `--traceback` shows where it was noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import experiments  # noqa: F401  # registers every experiment
from cnnlib import stopping
from cnnlib.architectures import ARCHITECTURES
from cnnlib.config import EXPERIMENTS, Arm, Experiment, Growth, assignments, override
from cnnlib.cost import BYTES
from cnnlib.demo import write
from cnnlib.demos import DEMOS
from cnnlib.errors import Stopped, UserError
from cnnlib.fields import to_dict
from cnnlib.spec import FILTERS, Shape, shape_text

if TYPE_CHECKING:
    from cnnlib.launch.jobs import Launch
    from cnnlib.launch.merge import Merged
    from cnnlib.multihost import Hosts
    from cnnlib.results_page import Asked

COMMANDS = {
    "list": "list",
    "show": "show NAME [FIELD=VALUE ...] [--on HARDWARE [--json]]",
    "run": "run NAME [FIELD=VALUE ...] [--out DIR] [--resume [--force]] [--wandb MODE]\n           "
    "[--tensorboard] [--no-check] [--profile] [--traceback]\n           "
    "[--distributed [--coordinator HOST:PORT --processes N --process-id I] [--heartbeat SECONDS]]\n           "
    "[--part ARM[-FIRST..LAST]]\n           "
    "[--executor local|slurm|ray [--seeds-per-job N] [--jobs-at-a-time N] [--retries N] [--gpus-per-job N]\n           "
    "[--slurm OPTION=VALUE ...] [--ray-address ADDRESS] [--resources NAME=N ...]]",
    "merge": "merge DIR [--force] [--wandb MODE]",
    "runs": "runs [DIR]",
    "check": "check [--precision default|high|highest] [--only TEXT]",
    "compare": "compare DIR DIR [DIR ...] [--mixed]",
    "report": "report DIR [DIR ...] [--out FILE]",
    "all": "all [--out DIR]",
    "results": "results [DIR]",
    "wandb": "wandb DIR [--wandb auto|online|offline]",
    "demo": "demo NAME [--out DIR] [--show]",
    "count": "count WHAT [FIELD=VALUE ...] [--input HxWxC] [--classes N] [--connectivity full|local|conv] "
    "[--match MEASURE:REFERENCE] [--batch-size N] [--dtype TYPE] [--json]",
}
USAGE = "usage: python -m experiments " + "\n       python -m experiments ".join(COMMANDS.values())


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.usage}")


def parser_for(command: str) -> Parser:
    parser = Parser(usage=f"python -m experiments {COMMANDS[command]}", allow_abbrev=False)
    if command == "count":
        parser.add_argument("what", metavar="WHAT", nargs="+", help="an experiment, an architecture, or layers")
        parser.add_argument("--input", metavar="HxWxC", help="shape of an example (an experiment has its data's)")
        parser.add_argument("--classes", metavar="N", type=int, help="for layers that end in as many units (10)")
        parser.add_argument("--connectivity", choices=sorted(FILTERS), help="how layers with a window are read")
        parser.add_argument("--match", metavar="MEASURE:REFERENCE", help="a budget to scale the widths to")
        parser.add_argument("--batch-size", metavar="N", type=int, default=128, help="for the bytes of a training step")
        parser.add_argument("--dtype", choices=sorted(BYTES), default="float32", help="for the bytes")
        parser.add_argument("--json", action="store_true", help="layers and total, for programs")
    elif command == "runs":
        parser.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="where to look (runs)")
    elif command == "all":
        parser.add_argument("--out", metavar="DIR", default="runs", help="where the folders of the runs go (runs)")
    elif command == "results":
        parser.add_argument("folder", metavar="DIR", nargs="?", default="docs", help="folders with results (docs)")
    elif command == "merge":
        parser.add_argument("folder", metavar="DIR", help="of a run whose jobs are finished")
        parser.add_argument("--force", action="store_true", help="merge jobs that have not computed the same")
        modes = ("auto", "online", "offline", "off")
        parser.add_argument("--wandb", choices=modes, default="auto", help="a copy of the run in Weights & Biases")
    elif command == "wandb":
        parser.add_argument("folder", metavar="DIR", help="of a run, finished or not")
        parser.add_argument("--wandb", choices=("auto", "online", "offline"), default="auto", help="where to (auto)")
    elif command == "report":
        parser.add_argument("folders", metavar="DIR", nargs="+", help="folders of finished runs")
        parser.add_argument("--out", metavar="FILE", default="report.html", help="the page (report.html)")
    elif command == "demo":
        parser.add_argument("name", metavar="NAME", help="a picture: `list` shows them")
        parser.add_argument("--out", metavar="DIR", default="demos", help="where it goes (demos)")
        parser.add_argument("--show", action="store_true", help="open it in a window as well")
    elif command == "compare":
        parser.add_argument("folders", metavar="DIR", nargs="+", help="folders of finished runs")
        parser.add_argument("--mixed", action="store_true", help="also runs of different devices or precisions")
    elif command == "check":
        precisions = ("default", "high", "highest")
        parser.add_argument("--precision", choices=precisions, default="default", help="of float32 products")
        parser.add_argument("--only", metavar="TEXT", default="", help="only operations with this in their name")
    elif command != "list":
        parser.add_argument("name", metavar="NAME", help=f"an experiment: {', '.join(EXPERIMENTS)}")
        parser.add_argument(
            "overrides", metavar="FIELD=VALUE", nargs="*", help="such as epochs=3; `show` prints them all"
        )
    if command == "show":
        parser.add_argument(
            "--on", metavar="HARDWARE", help="compile for tpu:v5e:2x4 or cuda:h100, say, which need not be there"
        )
        parser.add_argument("--json", action="store_true", help="what --on finds, for programs")
    if command == "run":
        modes = ("auto", "online", "offline", "off")
        parser.add_argument("--wandb", choices=modes, default="auto", help="a copy of the run in Weights & Biases")
        parser.add_argument("--tensorboard", action="store_true", help="write scalars for TensorBoard")
        parser.add_argument("--out", metavar="DIR", help="where results go (default: runs/NAME)")
        parser.add_argument("--resume", action="store_true", help="go on with the run that is there")
        parser.add_argument("--no-check", action="store_true", help="train on a backend that may be wrong")
        parser.add_argument(
            "--profile", action="store_true", help="write a trace of an epoch of each arm, which then takes longer"
        )
        parser.add_argument("--force", action="store_true", help="resume although the results will not be comparable")
        parser.add_argument("--distributed", action="store_true", help="together with the same command on other hosts")
        parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is found")
        parser.add_argument("--processes", metavar="N", type=int, help="how many there are, one a host")
        parser.add_argument("--process-id", metavar="I", type=int, help="which this one is, from 0 on")
        parser.add_argument("--heartbeat", metavar="SECONDS", type=int, help="after which a silent host is dead (20)")
        parser.add_argument("--part", metavar="PART", help="train ARM alone, or ARM-FIRST..LAST: a block of its seeds")
        parser.add_argument("--executor", choices=("local", "slurm", "ray"), help="train as jobs, beside one another")
        parser.add_argument("--seeds-per-job", metavar="N", type=int, help="of an arm (all: a job per arm)")
        parser.add_argument("--jobs-at-a-time", metavar="N", type=int, help="local, slurm (as many as fit)")
        parser.add_argument("--retries", metavar="N", type=int, help="times that a killed job is started again (3)")
        parser.add_argument("--gpus-per-job", metavar="N", type=int, help="slurm, ray")
        parser.add_argument("--slurm", metavar="OPTION=VALUE", action="append", help="of sbatch, such as time=04:00:00")
        parser.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster (RAY_ADDRESS; else one of our own)")
        parser.add_argument("--resources", metavar="NAME=N", action="append", help="of a Ray node, such as TPU=4")
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it was noticed")
    return parser


def lab_note(name: str) -> str:
    """The docstring of the file that declares an experiment; its first line is the question in short."""
    module = inspect.getmodule(EXPERIMENTS.declaration(name))
    return inspect.cleandoc((module and module.__doc__) or "")


def command_list() -> None:
    width = max(map(len, EXPERIMENTS))
    for name in EXPERIMENTS:
        print(f"{name:<{width}}  {lab_note(name).splitlines()[0]}")
    print("\npictures, `python -m experiments demo NAME`:\n")
    for name in DEMOS:
        print(f"{name:<{width}}  {inspect.getdoc(DEMOS.declaration(name))}")


def command_demo(name: str, out: str, show: bool) -> None:
    demo = DEMOS.get(name)
    if not out:
        raise UserError("--out needs a folder")
    try:
        path, opened = write(demo, Path(out), show)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    print(f"{textwrap.fill(demo.look, 100)}\nwritten: {path}")
    if show and not opened:
        print("no window: matplotlib finds no screen here, or no toolkit to open one with (such as python3-tk)")


def command_show(name: str, experiment: Experiment | Growth) -> None:
    from cnnlib.resolve import resolve

    told = f"{name}\n\n{textwrap.indent(lab_note(name), '  ')}\n\nconfiguration, as overrides:\n\n"
    told += textwrap.indent("\n".join(assignments(experiment)), "  ")
    if isinstance(experiment, Growth):
        from cnnlib.growth import counts, resolve_growth

        found = {"config": to_dict(experiment), "counts": counts(resolve_growth(experiment))}
        print(f"{told}\n")
        print_growth(found)
        return
    from rich.console import Console

    from cnnlib.plan import print_plan

    arms = resolve(experiment)
    print(told)
    print()
    for known in dict.fromkeys((arm.data, arm.description.name) for arm in arms):
        description = next(arm.description for arm in arms if (arm.data, arm.description.name) == known)
        available = ", ".join(f"{count:,} {split}" for split, count in description.counts.items()) or "not prepared yet"
        shape = shape_text(description.input_shape)
        print(f"data: {description.name}, {shape}, {description.num_classes} classes; {available}")
    print("\narms; counts are for one example, taps on padding counted:")
    print_plan(arms, len({arm.program for arm in arms}), Console(highlight=False))
    matches = [f"{a.name}: {a.match}\n  {a.model}" for a in arms if a.match]
    if matches:
        print("\nmatched budgets:\n\n" + textwrap.indent("\n".join(matches), "  "))


def command_on(name: str, experiment: Experiment | Growth, hardware: str, as_json: bool) -> None:
    """Compile every arm's epoch for hardware that need not be there, and print what it would take."""
    from cnnlib.aot.hardware import parse_target, set_environment

    target = parse_target(hardware)
    if isinstance(experiment, Growth):
        raise UserError(f"{name} trains nothing: --on has no meaning for it")
    set_environment()
    from rich.console import Console

    from cnnlib.aot.arms import print_reports, reports
    from cnnlib.resolve import resolve

    console, found = Console(highlight=False), []
    for report in reports(resolve(experiment), target):
        found.append(report)
        if not as_json:
            console.print(f"{report.name} {'does not compile' if isinstance(report.found, str) else 'is compiled'}")
    if as_json:
        print(json.dumps({"topology": str(target), "arms": [report.plain() for report in found]}, indent=2))
    else:
        print_reports(found, target, console)


def command_count(options: argparse.Namespace) -> None:
    """Counts an experiment's arms, an architecture, or layers in short notation; without JAX."""
    from rich.console import Console

    from cnnlib.counting import print_summary, summary
    from cnnlib.resolve import resolve_arms
    from cnnlib.spec import parse_model, parse_shape

    if not all(1 <= number <= 10**9 for number in (options.batch_size, options.classes or 1)) or options.classes == 0:
        raise UserError("--batch-size and --classes must be at least 1, and at most 1,000,000,000")
    what, *rest = options.what
    input_shape = None if options.input is None else parse_shape(options.input)
    num_classes = options.classes or 10
    is_experiment = what in EXPERIMENTS
    inputs: dict[str, tuple[Shape, int]] = {}
    if is_experiment:
        experiment = override(EXPERIMENTS.get(what), rest)
        arms = experiment.arms
        if isinstance(experiment, Experiment):
            from cnnlib.data import describe

            for arm in arms:
                one = experiment.of_arm(arm)
                description = describe(one.data)
                shape = input_shape or one.augment.seen_shape(description.input_shape)
                inputs[arm.name] = (shape, options.classes or description.num_classes)
        else:
            num_classes = options.classes or experiment.num_classes
    elif what in ARCHITECTURES and not rest:
        arms = (Arm(what, ARCHITECTURES.get(what)),)
    else:
        try:
            arms = (Arm("layers", parse_model(" ".join(options.what))),)
        except UserError as error:
            names = ", ".join((*EXPERIMENTS, *ARCHITECTURES))
            raise UserError(f"{error}; or an experiment or architecture: {names}") from None
    if input_shape is not None:
        inputs = inputs or {arm.name: (input_shape, num_classes) for arm in arms}
    if not inputs:
        raise UserError(f"count {what} needs the shape of an example: --input HxWxC, such as --input 28x28x1")
    chosen = {"connectivity": options.connectivity, "match": options.match}
    arms = tuple(replace(arm, **{name: value for name, value in chosen.items() if value}) for arm in arms)
    summaries = []
    for resolved in resolve_arms(arms, inputs):
        name = {"name": resolved.name} if is_experiment else {}
        match = {"match": resolved.match.plain()} if resolved.match else {}
        summaries.append(
            {**name, **match, **summary(resolved.model, resolved.input_shape, options.batch_size, options.dtype)}
        )
        if not options.json:
            console = Console(highlight=False)
            console.print(f"{resolved.name} on {shape_text(resolved.input_shape)}: {resolved.model}", markup=False)
            if resolved.match:
                console.print(f"matched: {resolved.match}", markup=False)
            print_summary(summaries[-1], console)
            console.print()
    if options.json:
        print(json.dumps({"experiment": what, "arms": summaries} if is_experiment else summaries[0], indent=2))


def command_look(options: argparse.Namespace) -> None:
    """Looks at the folders of runs; without JAX."""
    from rich.console import Console

    from cnnlib.overview import compare, print_runs

    console = Console(highlight=False)
    if "folder" in options:
        print_runs(Path(options.folder), console)
    elif len(options.folders) < 2:
        raise UserError(f"compare needs two runs or more; usage: python -m experiments {COMMANDS['compare']}")
    else:
        compare([Path(folder) for folder in options.folders], console, options.mixed)


def command_check(precision: Literal["default", "high", "highest"], only: str) -> int:
    """Checks JAX's default device; the status is 1 where something is wrong."""
    from rich.console import Console

    from cnnlib.check_table import print_check

    return 0 if print_check(precision, only, Console(highlight=False)) else 1


def command_all(out: str) -> int:
    """Runs every experiment, or goes on with it, each in a process of its own; the status is that of the worst."""
    worst = 0
    for name in EXPERIMENTS:
        place = Path(out) / name
        resume = [] if isinstance(EXPERIMENTS.get(name), Growth) else ["--resume"]
        command = ["run", name, "--out", str(place), *resume]
        print(f"python -m experiments {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "experiments", *command], check=False).returncode
        if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return status
        worst = max(worst, status)
    return worst


def command_report(folders: Sequence[str], out: str) -> None:
    """Writes the page about finished runs; without JAX."""
    from cnnlib.page import write_report

    write_report(
        [Path(folder) for folder in folders], Path(out), lambda name: lab_note(name) if name in EXPERIMENTS else None
    )
    print(f"written: {out}")


def command_results(folder: str) -> None:
    """Writes RESULTS.md from stored results; without JAX."""
    from cnnlib.results_page import write_page

    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}")
    print(f"written: {write_page(Path(folder), asked)}")


def command_wandb(folder: Path, asked: str) -> None:
    """Send a run to W&B; without JAX."""
    from cnnlib.folder import RECORD, inside, read_json, require_format, state
    from cnnlib.tracking import read_json_lines
    from cnnlib.wandb_copy import chosen_mode, send

    require_format(folder, read_json(folder / RECORD))
    inside(folder, folder / "wandb")
    mode, hint = chosen_mode(asked)
    if mode is None:
        raise UserError(hint or "W&B is off: WANDB_MODE is disabled")
    send(folder, mode, iter([read_json_lines(folder / "metrics.jsonl")]), lambda: int(state(folder) != "finished"))


def asked(name: str) -> Asked:
    """What a registered experiment asks."""
    from cnnlib.results_page import Asked

    experiment = EXPERIMENTS.get(name)
    planned = experiment.comparisons if isinstance(experiment, Experiment) else ()
    return Asked(lab_note(name).splitlines()[0], planned)


def print_growth(results: dict[str, Any]) -> None:
    from rich.console import Console

    from cnnlib.growth import tables
    from cnnlib.tables import print_table

    console = Console(highlight=False)
    for title, columns, rows in tables(results):
        console.print(f"{title}:", markup=False)
        print_table(console, columns, rows, padding=2)


def command_growth(name: str, growth: Growth, out: Path) -> None:
    from cnnlib.folder import GROWTH_FILES
    from cnnlib.growth import run_growth

    results, earlier = run_growth(growth, name, out)
    if earlier is not None:
        print(f"the files of an earlier run moved to {earlier}")
    print_growth(results)
    print(f"written to {out}: {', '.join(GROWTH_FILES)}")


def command_run(name: str, experiment: Experiment, out: Path, options: argparse.Namespace) -> int:
    """Trains; with `--distributed` as one of several processes, of which process 0 writes and tells."""
    from cnnlib import multihost

    joins = [getattr(options, option) for option in JOIN_OPTIONS]
    cluster = multihost.asked(options.distributed, *joins)
    if cluster is None:
        return trained(name, experiment, out, options)

    from cnnlib.mesh import use_cores

    use_cores(experiment.devices)
    with multihost.join(cluster) as joined:
        does = trained if joined.is_first else followed
        return does(name, experiment, out, options, joined)


JOIN_OPTIONS = ("coordinator", "processes", "process_id", "heartbeat")
JOB_OPTIONS = ("seeds_per_job", "jobs_at_a_time", "retries", "ray_address", "gpus_per_job", "resources", "slurm")


def jobs_asked(options: argparse.Namespace) -> Launch | None:
    """Return how the experiment is to be divided into jobs; None: not at all. Raises UserError for what cannot be."""
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
    """These options, as they were given."""
    return [
        text
        for name in names
        if (value := getattr(options, name)) is not None
        for one in (value if isinstance(value, list) else [value])
        for text in (f"--{name.replace('_', '-')}", str(one))
    ]


def followed(name: str, experiment: Experiment, out: Path, options: argparse.Namespace, joined: Hosts) -> int:
    """What a process does that is not the first of a run on several hosts: it trains with the others, and says so."""
    from cnnlib.run import run
    from cnnlib.watcher import Watcher

    print(f"process {joined.process} of {joined.count} trains {name}; process 0 tells and writes", flush=True)
    with stopping.by_signal() as wish:
        try:
            how = {"resume": options.resume, "force": options.force, "stop": wish.is_made}
            how["check"] = not options.no_check
            run(experiment, name, out, Watcher(), **how, hosts=joined)
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
    """Train, or merge what jobs have trained; write and print."""
    from cnnlib.multihost import ALONE
    from cnnlib.resolve import Part
    from cnnlib.watcher import Notice, Watcher, Watchers

    with contextlib.ExitStack() as stack:
        from cnnlib.wandb_copy import WandbCopy, chosen_mode

        mode, hint = chosen_mode(options.wandb)

        from cnnlib.folder import RUN_FILES
        from cnnlib.mesh import use_cores
        from cnnlib.plan import RateKeeper
        from cnnlib.report import ReportWriter, print_results
        from cnnlib.run import run
        from cnnlib.tensorboard import TensorBoard
        from cnnlib.terminal import RunConsole, watcher_for

        use_cores(experiment.devices)
        console = RunConsole()
        part = None if merged is not None or options.part is None else Part.named(options.part)
        wish = stack.enter_context(stopping.by_signal())
        try:
            with watcher_for(console) as shown, contextlib.ExitStack() as ends:
                watchers: list[Watcher] = [shown]
                if part is None:  # of a part others make the report
                    watchers += [ReportWriter(out), RateKeeper()]
                if hint is not None:
                    watchers.append(Notice(hint, shown.says))
                if options.tensorboard:
                    scalars = TensorBoard()
                    ends.callback(scalars.close)
                    watchers.append(scalars)
                if mode is not None:
                    copy = WandbCopy(mode, shown.says)
                    ends.push(lambda kind, *_: copy.close(0 if kind is None else 1))
                    watchers.append(copy)
                how = {"resume": options.resume, "force": options.force, "stop": wish.is_made}
                how |= {
                    "hosts": joined or ALONE,
                    "part": part,
                    "merged": merged,
                    "check": not options.no_check,
                    "profile": options.profile,
                }
                results = run(experiment, name, out, Watchers(watchers), **how)
        except Stopped as stopped:
            print(how_to_go_on(stopped, name, options), file=sys.stderr)
            return 128 + (wish.signal or signal.SIGTERM)
    if part is None:
        print_results(results, console)
        console.print(f"written to {out}: {', '.join(RUN_FILES)}", markup=False, highlight=False, soft_wrap=True)
    return 0


def how_to_go_on(stopped: Stopped, name: str, options: argparse.Namespace) -> str:
    """The line that a run which was stopped ends with."""
    command = ["python", "-m", "experiments", "run", name, *options.overrides]
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


def command_jobs(name: str, experiment: Experiment, out: Path, options: argparse.Namespace, launch: Launch) -> int:
    """Train as jobs, and merge what they came to."""
    from cnnlib.folder import state
    from cnnlib.launch.merge import read_jobs
    from cnnlib.launch.start import start
    from cnnlib.terminal import RunConsole, watcher_for
    from cnnlib.wandb_copy import chosen_mode

    chosen_mode(options.wandb)  # what cannot be had is said before anything trains
    if options.resume and state(out) == "finished":
        return trained(name, experiment, out, options)
    merge = given(options, ["wandb"]) + (["--force"] if options.force else [])
    run = [f"--{option.replace('_', '-')}" for option in ("no_check", "force") if getattr(options, option)]
    with stopping.by_signal() as wish, watcher_for(RunConsole()) as shown:
        how = {"resume": options.resume, "stop": wish.is_made, "says": shown.says}
        try:
            more = {"run": run, "merge": merge}
            is_finished = start(experiment, name, options.overrides, out, launch, more, **how)
        except Stopped as stopped:
            print(how_to_go_on(stopped, name, options), file=sys.stderr)
            return 128 + (wish.signal or signal.SIGTERM)
    return merged(read_jobs(out), out, options) if is_finished else 0


def command_merge(options: argparse.Namespace) -> int:
    """Merge the finished jobs of a run."""
    from cnnlib.launch.merge import read_jobs

    out = Path(options.folder)
    return merged(read_jobs(out), out, options)


def merged(jobs: Merged, out: Path, options: argparse.Namespace) -> int:
    """Write the results of a run of what its jobs came to."""
    options.resume = options.no_check = options.profile = options.tensorboard = False
    return trained(jobs.name, jobs.experiment, out, options, merged=jobs)


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    try:
        command, *rest = arguments or ("",)
        if command not in COMMANDS:
            raise UserError(f"no command {command!r}; there are: {', '.join(COMMANDS)}")
        options = parser_for(command).parse_intermixed_args(rest)
        if command == "list":
            command_list()
            return 0
        if command in ("run", "report") and options.out == "":
            raise UserError(f"--out needs a {'folder' if command == 'run' else 'file'}")
        if command == "run" and options.force and not options.resume:
            raise UserError("--force has no meaning without --resume")
        if command == "count":
            command_count(options)
            return 0
        if command == "check":
            return command_check(options.precision, options.only)
        if command == "demo":
            command_demo(options.name, options.out, options.show)
            return 0
        if command == "all":
            return command_all(options.out)
        if command == "report":
            command_report(options.folders, options.out)
            return 0
        if command == "results":
            command_results(options.folder)
            return 0
        if command == "merge":
            return command_merge(options)
        if command == "wandb":
            command_wandb(Path(options.folder), options.wandb)
            return 0
        if command in ("runs", "compare"):
            command_look(options)
            return 0
        experiment = override(EXPERIMENTS.get(options.name), options.overrides)
        if command == "show":
            if options.on is None and options.json:
                raise UserError("--json has no meaning without --on")
            if options.on is not None:
                command_on(options.name, experiment, options.on, options.json)
            else:
                command_show(options.name, experiment)
            return 0
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
            command_growth(options.name, experiment, out)
        elif launch is not None:
            return command_jobs(options.name, experiment, out, options, launch)
        else:
            return command_run(options.name, experiment, out, options)
        return 0
    except Exception as error:
        if "--traceback" in arguments or isinstance(error, BrokenPipeError):
            raise
        told = " ".join(str(error).split())
        if isinstance(error, UserError):
            print(f"error: {told}", file=sys.stderr)
            return 2
        # Not the user's mistake as far as we know. It still is one line, and never a success.
        kind = type(error).__name__
        print(f"error: unexpected {kind}: {told[:300]} (--traceback shows where)", file=sys.stderr)
        return 1


def end(status: int) -> NoReturn:
    """Leaves at once: JAX's threads may be at work still, and an interpreter that tears down under them crashes."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, such as `head`
        end(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        end(128 + signal.SIGINT)
    if "--distributed" in sys.argv:  # JAX would wait for processes that have died
        end(status)
    sys.exit(status)
