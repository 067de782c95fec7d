"""Budgets matched: the width at which a spec comes to a given number of parameters, connections or activations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import Any

from cnnlib.cost import count
from cnnlib.errors import UserError
from cnnlib.spec import LARGEST, Dense, Filter, Layer, Model, Shape, walk

MEASURES = (
    "parameters",
    "weights",
    "connections",
    "connections_without_padding",
    "macs",
    "macs_without_padding",
    "activations",
)
"""What budgets can be matched by: the numbers of a `Count`."""


MOST_WIDTHS, MOST_CHOICES = 10, 20_000
"""How many different widths are rounded one by one, and about how many choices of roundings are counted."""


@dataclass(frozen=True)
class Match:
    """A spec brought to a budget."""

    model: Model
    by: str
    target: int
    value: int
    """What the model has; the target itself where some rounding of the widths has it."""
    width: Fraction
    """The multiplier of all widths, before they are rounded."""

    @property
    def error(self) -> float:
        """(value - target) / target."""
        return (self.value - self.target) / self.target

    def plain(self) -> dict[str, Any]:
        """JSON-ready: `by`, `target`, `value`, `width`."""
        return {"by": self.by, "target": self.target, "value": self.value, "width": float(self.width)}

    def __str__(self) -> str:
        exact = f"{self.value:,} {self.by}, exactly"
        near = f"{self.value:,} {self.by} for {self.target:,} ({100 * self.error:+.2g} %)"
        return f"{exact if self.value == self.target else near}, widths x {float(self.width):.3g}"


def widths(model: Model) -> tuple[int, ...]:
    """The different widths that a multiplier changes, ascending: features and hidden units, not the outputs.

    The outputs are the last layer's, where that is a `Dense`.
    """
    return tuple(sorted({_width(layer) for layer in walk(_split(model)[0]) if isinstance(layer, Filter | Dense)}))


def scaled(model: Model, multiplier: Fraction | float) -> Model:
    """The model with all its widths times a number, rounded to the nearest whole number, halves up, at least 1."""
    return _with_widths(
        model, {width: max(1, math.floor(width * Fraction(multiplier) + Fraction(1, 2))) for width in widths(model)}
    )


def match(model: Model, target: int, by: str, input_shape: Shape) -> Match:
    """The model at the width where its count comes nearest to the target.

    All widths (see `widths`) are multiplied by one number, and each is then rounded up or down; layers of one width
    keep one width, so that residual sums still fit. Over all multipliers and roundings the count nearest to the target
    is found, of equal ones that whose widths are nearest to their proportions; where a layer is so wide that these are
    more than `MOST_CHOICES`, over that many around the multiplier whose plain rounding meets the target. `by` is one of
    `MEASURES`. Raises UserError for a target that is out of reach, below the model with all widths 1, for a model in
    which nothing has a width, and for one of more than `MOST_WIDTHS` different widths.
    """
    if by not in MEASURES:
        raise UserError(f"no measure {by!r} to match by; there are: {', '.join(MEASURES)}")
    if target < 1:
        raise UserError(f"a budget must be at least 1, not {target}")
    bases = widths(model)

    def counted(sizes: tuple[int, ...]) -> int:
        try:
            found: int = getattr(count(_with_widths(model, dict(zip(bases, sizes, strict=True))), input_shape), by)
        except UserError as error:  # a residual around the input, which keeps its channels
            raise UserError(f"the widths of {model} cannot change: {error}") from None
        return found

    if not bases:
        if (only := counted(())) != target:
            raise UserError(f"no layer of {model} has a width to change: it has {only:,} {by}, not {target:,}")
        return Match(model, by, target, target, Fraction(1))
    value = _quadratic(counted, len(bases))
    least = value((1,) * len(bases))
    if target < least:
        raise UserError(f"{target:,} {by} cannot be reached: {model} has {least:,} with every width 1")
    if value(tuple(LARGEST for _ in bases)) < target:
        raise UserError(f"{target:,} {by} cannot be reached: {model} has fewer with every width {LARGEST:,}")

    # With every width rounded up a model first reaches the target at `low`, rounded down it last stays within it at
    # `high`; in between some are above and some below. Counts grow with each width, so both are found by bisection.
    limit = Fraction(LARGEST, bases[0])
    low, _ = _turn(lambda m: value(_rounded(bases, m, math.ceil)) >= target, limit)
    _, high = _turn(lambda m: value(_rounded(bases, m, math.floor)) > target, limit)
    # Where many widths or a wide layer make for more choices than can be counted one by one, those in the middle.
    if len(bases) > MOST_WIDTHS:
        raise UserError(f"{model} has {len(bases)} different widths; match rounds {MOST_WIDTHS} at most")
    middle, _ = _turn(lambda m: value(_rounded(bases, m, round)) >= target, limit)
    reach = Fraction(MOST_CHOICES >> len(bases), 2 * sum(bases))
    low, high = max(low, middle - reach), min(high, middle + reach)
    best: tuple[int, float, tuple[int, ...], Fraction] | None = None
    for multiplier in _cells(bases, low, high):
        either = (_rounded(bases, multiplier, each) for each in (math.floor, math.ceil))
        for sizes in itertools.product(*(sorted(set(pair)) for pair in zip(*either, strict=True))):
            distortion = sum(
                abs(math.log(size / (width * multiplier))) for size, width in zip(sizes, bases, strict=True)
            )
            candidate = (abs(value(sizes) - target), distortion, sizes, multiplier)
            if best is None or candidate[:3] < best[:3]:
                best = candidate
    assert best is not None, "the cell in which the count crosses the target is among those tried"
    _, _, sizes, multiplier = best
    matched = _with_widths(model, dict(zip(bases, sizes, strict=True)))
    assert counted(sizes) == value(sizes), "counts are quadratic in the widths"
    return Match(matched, by, target, value(sizes), multiplier)


def _quadratic(counted: Callable[[tuple[int, ...]], int], number: int) -> Callable[[tuple[int, ...]], int]:
    """The polynomial of degree two that a count is in the widths of a model: each connection joins two layers.

    It is made from counts at the widths 1, 2 and 3, exactly. To ask it costs microseconds, to count milliseconds.
    """

    def at(*raised: int) -> int:
        return counted(tuple(1 + raised.count(index) for index in range(number)))

    base, once = at(), [at(i) for i in range(number)]
    twice = [(at(i, i) - 2 * one + base) // 2 for i, one in enumerate(once)]
    slopes = [one - base - half for one, half in zip(once, twice, strict=True)]
    products = [
        (i, j, mixed)
        for i, j in itertools.combinations(range(number), 2)
        if (mixed := at(i, j) - once[i] - once[j] + base)
    ]

    @cache  # neighbouring multipliers share most of their roundings
    def value(sizes: tuple[int, ...]) -> int:
        x = [size - 1 for size in sizes]
        alone = sum(n * (slope + half * n) for n, slope, half in zip(x, slopes, twice, strict=True))
        return base + alone + sum(mixed * x[i] * x[j] for i, j, mixed in products)

    return value


def _split(model: Model) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The layers whose widths may change, and the one that makes the outputs."""
    cut = len(model.layers) - isinstance(model.layers[-1], Dense)
    return model.layers[:cut], model.layers[cut:]


def _width(layer: Filter | Dense) -> int:
    return layer.features if isinstance(layer, Filter) else layer.num_units


def _with_widths(model: Model, new: dict[int, int]) -> Model:
    hidden, outputs = _split(model)
    return Model((*Model(hidden).replaced(partial(_widened, new)).layers, *outputs)) if hidden else model


def _widened(new: dict[int, int], layer: Layer) -> Layer:
    if isinstance(layer, Filter):
        return dataclasses.replace(layer, features=new[layer.features])
    if isinstance(layer, Dense):
        return dataclasses.replace(layer, units=new[layer.num_units])
    return layer


def _rounded(bases: tuple[int, ...], multiplier: Fraction, each: Callable[[Fraction], int]) -> tuple[int, ...]:
    return tuple(min(LARGEST, max(1, each(width * multiplier))) for width in bases)


def _turn(holds: Callable[[Fraction], bool], limit: Fraction) -> tuple[Fraction, Fraction]:
    """Two neighbouring multipliers between which what does not hold begins to; `limit` twice if it never does."""
    below, above = Fraction(0), Fraction(1)
    while not holds(above):
        if above >= limit:
            return limit, limit
        below, above = above, min(2 * above, limit)
    while above - below > Fraction(1, 2**40):
        middle = (below + above) / 2
        below, above = (below, middle) if holds(middle) else (middle, above)
    return below, above


def _cells(bases: tuple[int, ...], low: Fraction, high: Fraction) -> Iterator[Fraction]:
    """A multiplier of each stretch, between `low` and `high`, in which no width crosses a whole number."""
    edges = {low, high}
    for width in bases:
        edges.update(Fraction(k, width) for k in range(math.ceil(low * width), math.floor(high * width) + 1))
    for first, last in itertools.pairwise(sorted(edges)):
        yield (first + last) / 2
