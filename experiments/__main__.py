"""The command line: `python -m experiments list | show NAME | run NAME`.

Nothing here imports JAX until an experiment is run. Whatever the user got wrong is one line on standard error and exit
status 2; `--traceback` shows where it was noticed.
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import experiments  # noqa: F401  # registers every experiment
from cnnlib.config import EXPERIMENTS, Experiment, assignments, lane_numbers, override
from cnnlib.errors import UserError

COMMANDS = {
    "list": "list",
    "show": "show NAME [FIELD=VALUE ...]",
    "run": "run NAME [FIELD=VALUE ...] [--out DIR] [--traceback]",
}
USAGE = "usage: python -m experiments " + "\n       python -m experiments ".join(COMMANDS.values())


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.usage}")


def parser_for(command: str) -> Parser:
    parser = Parser(usage=f"python -m experiments {COMMANDS[command]}", allow_abbrev=False)
    if command != "list":
        parser.add_argument("name", metavar="NAME", help=f"an experiment: {', '.join(EXPERIMENTS)}")
        parser.add_argument(
            "overrides", metavar="FIELD=VALUE", nargs="*", help="such as epochs=3; `show` prints them all"
        )
    if command == "run":
        parser.add_argument("--out", metavar="DIR", help="where results go (default: runs/NAME)")
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


def command_show(name: str, experiment: Experiment) -> None:
    from cnnlib.data import describe
    from cnnlib.resolve import resolve
    from cnnlib.spec import shape_text

    description = describe(experiment.data)
    arms = resolve(experiment, description)
    counts = ", ".join(f"{count:,} {split}" for split, count in description.counts.items()) or "not prepared yet"
    print(f"{name}\n\n{textwrap.indent(lab_note(name), '  ')}\n\nconfiguration, as overrides:\n")
    print(textwrap.indent("\n".join(assignments(experiment)), "  "))
    shape = shape_text(description.input_shape)
    print(f"\ndata: {description.name}, {shape}, {description.num_classes} classes; {counts}")
    print(
        f"\narms, each with {len(lane_numbers(experiment))} lanes; counts for one example, taps on padding counted:\n"
    )
    header = ("arm", "connectivity", "parameters", "connections", "multiply-adds")
    rows = [
        (a.name, a.model.connectivity, *(f"{n:,}" for n in (a.count.parameters, a.count.connections, a.count.macs)))
        for a in arms
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())


def command_run(name: str, experiment: Experiment, out: Path) -> None:
    from cnnlib import report, tracking
    from cnnlib.run import run
    from cnnlib.terminal import RunConsole, watcher_for

    console = RunConsole()
    with watcher_for(console) as watcher:
        results = run(experiment, name, out, watcher)
    tracking.write_whole(out / "table.md", lambda path: path.write_text(report.markdown(results), encoding="utf-8"))
    tracking.write_whole(out / "accuracy.png", lambda path: report.accuracy_figure(results, path))
    report.print_table(results, console)
    console.print(f"written to {out}: {', '.join(tracking.RUN_FILES)}", markup=False, highlight=False, soft_wrap=True)


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
        if command == "run" and options.out == "":
            raise UserError("--out needs a folder")
        experiment = override(EXPERIMENTS.get(options.name), options.overrides)
        if command == "show":
            command_show(options.name, experiment)
        else:
            command_run(options.name, experiment, Path(options.out or Path("runs", options.name)))
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
    sys.exit(status)
