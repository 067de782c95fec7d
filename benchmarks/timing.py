"""Time contestants on a noisy machine. They run in turn, after a warm-up. Report medians and ranges of the times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Contestant:
    """Something to time: `work()` does `units` units of work, and returns after the work is finished."""

    name: str
    work: Callable[[], Any]
    units: int = 1


def interleaved(contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Warm up all contestants, then run them in turn. Return each one's seconds per unit, one value per round."""
    for contestant in contestants:
        contestant.work()
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            seconds[contestant.name].append(timed(contestant))
    return seconds


def timed(contestant: Contestant) -> float:
    """Call the contestant once and return the seconds per unit."""
    start = time.perf_counter()
    contestant.work()
    return (time.perf_counter() - start) / contestant.units


def blocked(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Return a function that calls `function` and waits for the result. JAX itself returns before work is finished."""
    return lambda: jax.block_until_ready(function(*arguments))


def matrix_product(side: int = 2048) -> tuple[Contestant, float]:
    """Return a float32 matrix product and its number of operations. The product measures the speed of the machine."""
    a = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    return Contestant("matrix product", blocked(product, a)), 2.0 * side**3


def summary(seconds: list[float], ours: list[float] | None = None) -> dict[str, float]:
    """Return the median, lowest and highest of `seconds`, in milliseconds; add a median ratio if `ours` is given.

    A ratio is a time in `seconds` divided by the time in `ours` of the same round. So a slow phase of the machine
    affects both times of a ratio.
    """
    found = {
        "median_ms": 1e3 * float(np.median(seconds)),
        "low_ms": 1e3 * min(seconds),
        "high_ms": 1e3 * max(seconds),
    }
    return found if ours is None else {**found, "times_ours": float(np.median(np.divide(seconds, ours)))}


@dataclass(frozen=True)
class Table:
    """Results of a benchmark: rows with the same columns. The value None means that nothing was measured."""

    title: str
    rows: list[dict[str, Any]]

    def text(self, markdown: bool) -> str:
        """Return the table as text for a terminal, or as Markdown for a README."""
        header = [name.replace("_", " ") for name in self.rows[0]]
        cells = [[cell_text(name, value) for name, value in row.items()] for row in self.rows]
        if markdown:
            rule = [" --- " if index == 0 else " ---: " for index in range(len(header))]
            lines = [header, *cells]
            body = ["| " + " | ".join(line) + " |" for line in lines]
            return "\n".join([f"*{self.title}*", "", body[0], f"|{'|'.join(rule)}|", *body[1:]])
        widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
        aligned = [
            "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in (header, *cells)
        ]
        return "\n".join([self.title, "", *(line.rstrip() for line in aligned)])


def cell_text(name: str, value: Any) -> str:
    """Format a value: a dash for None, percent if the column's name begins with "share", two decimals for a float."""
    if value is None:
        return "-"
    if name.startswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return str(value)
