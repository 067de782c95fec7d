"""Sweeps as data: points made of factors, and an arm made of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from cnnlib.config import Arm

Point = dict[str, Any]
"""A value of each factor, by its name."""


def product(**factors: Iterable[Any]) -> list[Point]:
    """Each value of a factor with each of the others, the last factor running fastest."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def zipped(**factors: Iterable[Any]) -> list[Point]:
    """The first values of all factors, the second, and so on; raises ValueError where they are not equally many."""
    return [dict(zip(factors, values, strict=True)) for values in zip(*factors.values(), strict=True)]


def points(
    found: Iterable[Point], arm: Callable[..., Arm], where: Callable[..., bool] | None = None
) -> tuple[Arm, ...]:
    """An arm of each point, called with its values by name, but of those that `where` leaves out.

    A list of points is as good as a product or a zip, and they can be added.
    """
    return tuple(arm(**point) for point in found if where is None or where(**point))
