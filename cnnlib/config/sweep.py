"""Sweeps as data: combine factors into points, and make one arm per point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from cnnlib.config.schema import Arm

Point = dict[str, Any]
"""One value per factor: `{factor name: value}`."""


def product(**factors: Iterable[Any]) -> list[Point]:
    """Return all combinations of the factors' values; the last factor varies fastest."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def zipped(**factors: Iterable[Any]) -> list[Point]:
    """Return one point per position: all first values, all second values, ...; raise ValueError if lengths differ."""
    return [dict(zip(factors, values, strict=True)) for values in zip(*factors.values(), strict=True)]


def points(
    found: Iterable[Point], arm: Callable[..., Arm], where: Callable[..., bool] | None = None
) -> tuple[Arm, ...]:
    """Return `arm(**point)` for each point for which `where(**point)` is true (None: for all points).

    `found` is any list of points. Lists from `product` and `zipped` can be concatenated with `+`.
    """
    return tuple(arm(**point) for point in found if where is None or where(**point))
