"""`cnnlib check`: check that this machine computes correct results."""

from __future__ import annotations

import argparse


def add_check(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `check`."""
    precisions = ("default", "high", "highest")
    parser.add_argument(
        "--precision", choices=precisions, default="default", help="precision of float32 products (default: default)"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="check only operations whose name contains TEXT")


def command_check(options: argparse.Namespace) -> int:
    """Check JAX's default device. Return exit status 1 if a result is wrong, else 0."""
    from rich.console import Console

    from cnnlib.check.table import print_check

    return 0 if print_check(options.precision, options.only, Console(highlight=False)) else 1
