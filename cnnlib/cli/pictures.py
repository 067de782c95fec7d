"""`cnnlib demo`: draw the ideas as pictures."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from cnnlib.demos import DEMOS
from cnnlib.demos.demo import write
from cnnlib.errors import UserError


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `demo`."""
    parser.add_argument("name", metavar="NAME", help="name of a picture; `cnnlib list` prints all names")
    parser.add_argument("--out", metavar="DIR", default="demos", help="folder of the picture (default: demos)")
    parser.add_argument("--show", action="store_true", help="also open the picture in a window")


def command_demo(options: argparse.Namespace) -> int:
    """Draw a demo into a file. With `--show`, also open the picture in a window."""
    demo = DEMOS.get(options.name)
    if not options.out:
        raise UserError("--out needs a folder")
    try:
        path, is_opened = write(demo, Path(options.out), options.show)
    except OSError as error:
        raise UserError(f"cannot write to {options.out}: {error.strerror}") from error
    print(f"{textwrap.fill(demo.look, 100)}\nwritten: {path}")
    if options.show and not is_opened:
        print("no window: matplotlib finds no screen here, or no toolkit to open one with (such as python3-tk)")
    return 0
