"""Timing that can be read on a noisy machine: contestants in turn, warm, blocked, medians with their spread."""

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
    """Something to time: `work()` does `units` of it and returns when it is done."""

    name: str
    work: Callable[[], Any]
    units: int = 1


def interleaved(contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds a unit of each contestant: one measurement a round, all in turn, after one warm-up each."""
    for contestant in contestants:
        contestant.work()
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            start = time.perf_counter()
            contestant.work()
            seconds[contestant.name].append((time.perf_counter() - start) / contestant.units)
    return seconds


def blocked(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call that returns only when its result is there: JAX returns before the work is done."""
    return lambda: jax.block_until_ready(function(*arguments))


def matrix_product(side: int = 2048) -> tuple[Contestant, float]:
    """A large float32 matrix product as the yardstick of the machine, and its floating-point operations."""
    a = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    return Contestant("matrix product", blocked(product, a)), 2.0 * side**3


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, lowest and highest, in milliseconds."""
    return {
        "median_ms": 1e3 * float(np.median(seconds)),
        "low_ms": 1e3 * min(seconds),
        "high_ms": 1e3 * max(seconds),
    }
