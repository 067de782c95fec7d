"""Describe sweeps as data: combine factors into points, and make one arm per point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from cnnlib.config.schema import Arm

Point = dict[str, object]
"""One value per factor: `{factor name: value}`."""


def product(**factors: Iterable[object]) -> list[Point]:
    """Return all combinations of the factors' values; the last factor varies fastest."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def zipped(**factors: Iterable[object]) -> list[Point]:
    """Combine the first values of all factors into a point, then the second values, and so on.

    Raise ValueError if the factors have different numbers of values.
    """
    return [dict(zip(factors, values, strict=True)) for values in zip(*factors.values(), strict=True)]


def points(
    found: Iterable[Point], arm: Callable[..., Arm], where: Callable[..., bool] | None = None
) -> tuple[Arm, ...]:
    """Return one arm, `arm(**point)`, per point in `found`.

    If `where` is given, points for which `where(**point)` is false are left out.

    `found` is any list of points. Lists from `product` and `zipped` can be concatenated with `+`.
    """
    return tuple(arm(**point) for point in found if where is None or where(**point))
