"""`cnnlib check`: run the known-bad programs and every operation of training, and print one table."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from importlib.metadata import version

from rich.console import Console

from cnnlib.check.case import Precision
from cnnlib.check.cases import cases
from cnnlib.check.compare import FORMS, Found, check
from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.system.jaxlib_defects import DEFECTS
from cnnlib.train.programs import compile_cache
from cnnlib.train.sharding import devices

PATIENCE = 120.0
"""Time limit of a known-bad program in seconds. A correct run takes a few seconds."""


def print_check(precision: Precision, only: str, console: Console) -> bool:
    """Check JAX's default device and print the results line by line.

    Args:
        precision: Precision of float32 products.
        only: Run only programs and operations whose name contains this text.
        console: Console that prints the table.

    Returns:
        Whether all results are correct.

    Raises:
        UserError: No name contains `only`, or JAX finds no device.
    """
    device = devices()[0]
    known_bad = [one.name for one in DEFECTS if one.platform == device.platform]
    programs = [name for name in known_bad if only in name]
    chosen = [one for one in cases() if only in one.operation]
    if not programs and not chosen:
        names = dict.fromkeys((*known_bad, *(one.operation for one in cases())))
        raise UserError(f"nothing to check has {only!r} in its name; there are: {', '.join(names)}")
    flags = os.environ.get("XLA_FLAGS", "") or "none"
    used = f", {kernels.chosen()} kernels" if device.platform == "cpu" else ""

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{device.device_kind} ({device.platform}), jaxlib {version('jaxlib')}, precision {precision}{used}")
    line(f"XLA_FLAGS: {flags}\n")
    wrong = []
    for name in programs:
        outcome = run_known_bad(name)
        wrong += [f"{name}: {outcome}"] * (outcome != "right")
        line(f"{name:<46}{outcome:>10}")
    if chosen:
        line(f"\nlargest error in units of its tolerance (right: at most 1)\n{ROW.format(*COLUMNS)}")
    with compile_cache(True, line):
        for operation, own in itertools.groupby(chosen, lambda case: case.operation):
            found = list(check(tuple(own), tuple(FORMS), TYPES, precision))
            for form in FORMS:
                line(ROW.format(operation, form, *(cell(found, form, dtype) for dtype in TYPES)))
            wrong += [
                f"{one.operation} {one.size}, {one.form}, {one.dtype}: {one.error:.3g}" for one in found if one.is_wrong
            ]
    line("\neverything is right" if not wrong else "\nwrong:\n  " + "\n  ".join(wrong))
    return not wrong


TYPES = ("float32", "bfloat16")
COLUMNS = ("operation", "form", *TYPES)
ROW = "{:<28}{:<8}{:>10}{:>10}"


def cell(found: list[Found], form: str, dtype: str) -> str:
    """Return the largest error, over all sizes, of one form and type; a dash if training does not use the type."""
    errors = [one.error for one in found if (one.form, one.dtype) == (form, dtype)]
    return f"{max(errors):.3f}" if errors else "-"


def run_known_bad(name: str) -> str:
    """Run a known-bad program in its own process, because it may crash or hang. Return `right`, or what went wrong."""
    command = [sys.executable, "-m", "cnnlib.check.known_bad", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode < 0:
        return f"crashes ({signal.Signals(-done.returncode).name})"
    if done.returncode == 0:
        return "right"
    return "wrong" if done.stdout else f"fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
