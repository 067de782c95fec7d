"""The command line: `cnnlib COMMAND`, such as `list`, `run NAME` and `compare DIR DIR`; `python -m cnnlib` is the same.

After a user's mistake, a command prints one line on standard error and exits with status 2. The option `--traceback`
shows where the mistake was detected.
Each command imports only what it needs: `list` imports neither JAX nor NumPy.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from cnnlib.errors import UserError


class Command(NamedTuple):
    """A command. In its module, `add_NAME` declares its arguments and `command_NAME` runs it."""

    module: str
    usage: str


COMMANDS = {
    "list": Command("listing", "list"),
    "show": Command("declarations", "show NAME [FIELD=VALUE ...] [--on HARDWARE [--json]]"),
    "count": Command(
        "declarations",
        "count WHAT [FIELD=VALUE ...] [--input HxWxC] [--classes N]\n           "
        "[--connectivity full|local|conv] [--match MEASURE:REFERENCE]\n           "
        "[--batch-size N] [--dtype TYPE] [--json]",
    ),
    "run": Command(
        "training",
        "run NAME [FIELD=VALUE ...] [--out DIR] [--resume [--force]]\n           "
        "[--wandb MODE] [--tensorboard] [--no-check] [--profile] [--traceback]\n           "
        "[--distributed [--coordinator HOST:PORT --processes N\n           "
        "--process-id I] [--heartbeat SECONDS]]\n           "
        "[--part ARM[-FIRST..LAST]]\n           "
        "[--executor local|slurm|ray [--seeds-per-job N] [--jobs-at-a-time N]\n           "
        "[--retries N] [--gpus-per-job N] [--slurm OPTION=VALUE ...]\n           "
        "[--ray-address ADDRESS] [--resources NAME=N ...]]",
    ),
    "merge": Command("training", "merge DIR [--force] [--wandb MODE]"),
    "all": Command("training", "all [--out DIR]"),
    "runs": Command("finished", "runs [DIR]"),
    "compare": Command("finished", "compare DIR DIR [DIR ...] [--mixed]"),
    "report": Command("finished", "report DIR [DIR ...] [--out FILE]"),
    "results": Command("finished", "results [DIR]"),
    "wandb": Command("finished", "wandb DIR [--wandb auto|online|offline]"),
    "check": Command("checks", "check [--precision default|high|highest] [--only TEXT]"),
    "demo": Command("pictures", "demo NAME [--out DIR] [--show]"),
}
USAGE = "usage: cnnlib " + "\n       cnnlib ".join(command.usage for command in COMMANDS.values())


class Parser(argparse.ArgumentParser):
    """An argparse parser whose error message is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the message and the usage."""
        raise UserError(f"{message}; usage: {self.usage}")


def parser_for(command: str) -> Parser:
    """Return the parser for the arguments of a command."""
    parser = Parser(usage=f"cnnlib {COMMANDS[command].usage}", allow_abbrev=False)
    getattr(_module(command), f"add_{command}")(parser)
    parser.add_argument("--traceback", action="store_true", help="after an error, print the Python traceback")
    return parser


def _module(command: str) -> object:
    return importlib.import_module(f"cnnlib.cli.{COMMANDS[command].module}")


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status."""
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    try:
        command, *rest = arguments or ("",)
        if command not in COMMANDS:
            raise UserError(f"no command {command!r}; there are: {', '.join(COMMANDS)}")
        options = parser_for(command).parse_intermixed_args(rest)
        status: int = getattr(_module(command), f"command_{command}")(options)
        return status
    except Exception as error:
        if "--traceback" in arguments or isinstance(error, BrokenPipeError):
            raise
        told = " ".join(str(error).split())
        if isinstance(error, UserError):
            print(f"error: {told}", file=sys.stderr)
            return 2
        # Probably not the user's mistake. Still print only one line, and never return success.
        kind = type(error).__name__
        print(f"error: unexpected {kind}: {told[:300]} (--traceback shows where)", file=sys.stderr)
        return 1


def entry() -> NoReturn:
    """Run the command line of this process, then exit with its status."""
    # Tracing programs makes millions of objects that live as long as the process. With Python's default thresholds,
    # `run fc_vs_conv` (17 s) looked for garbage among them for 0.7 s, and freed them at exit for 0.6 s.
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        end(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        end(128 + signal.SIGINT)
    if "--distributed" in sys.argv:  # in a normal exit, JAX would wait for processes that have died
        end(status)
    sys.exit(status)


def end(status: int) -> NoReturn:
    """Exit at once. JAX's threads may still run, and a normal shutdown of the interpreter would then crash."""
    sys.stderr.flush()
    os._exit(status)
