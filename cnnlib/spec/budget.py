"""Match budgets: find the widths that give a model a wanted number of parameters, connections or activations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from typing import Any

from cnnlib.errors import UserError
from cnnlib.spec.counts import count
from cnnlib.spec.layers import Dense, Filter, Layer
from cnnlib.spec.model import Model, walk
from cnnlib.spec.window import LARGEST, Shape

MEASURES = (
    "parameters",
    "weights",
    "connections",
    "connections_without_padding",
    "macs",
    "macs_without_padding",
    "activations",
)
"""Names of the counts that can be a budget. Each name is an attribute of `Count`."""


MOST_WIDTHS, MOST_CHOICES = 10, 20_000
"""`match` accepts at most `MOST_WIDTHS` different widths. It tries at most about `MOST_CHOICES` ways to round them."""


@dataclass(frozen=True)
class Match:
    """A model whose widths are matched to a budget."""

    model: Model
    by: str
    target: int
    value: int
    """The count of `model`. It equals `target` if some rounding of the widths gives exactly that count."""
    width: Fraction
    """The multiplier of all widths, before rounding."""

    @property
    def error(self) -> float:
        """Return the relative error, (value - target) / target."""
        return (self.value - self.target) / self.target

    def plain(self) -> dict[str, Any]:
        """Return a JSON-ready dict of `by`, `target`, `value` and `width`."""
        return {"by": self.by, "target": self.target, "value": self.value, "width": float(self.width)}

    def __str__(self) -> str:
        exact = f"{self.value:,} {self.by}, exactly"
        near = f"{self.value:,} {self.by} for {self.target:,} ({100 * self.error:+.2g} %)"
        return f"{exact if self.value == self.target else near}, widths x {float(self.width):.3g}"


def widths(model: Model) -> tuple[int, ...]:
    """Return the different widths that a multiplier changes, in ascending order.

    A width is the number of features or units of a layer. If the last layer is a `Dense`, its units are the outputs,
    and their number does not change.
    """
    return tuple(sorted({_width(layer) for layer in walk(_split(model)[0]) if isinstance(layer, Filter | Dense)}))


def scaled(model: Model, multiplier: Fraction | float) -> Model:
    """Multiply each width of the model by `multiplier`, and round it to the nearest integer (halves up), at least 1."""
    return _with_widths(
        model, {width: max(1, math.floor(width * Fraction(multiplier) + Fraction(1, 2))) for width in widths(model)}
    )


def match(model: Model, target: int, by: str, input_shape: Shape) -> Match:
    """Find the widths that bring a count of the model nearest to `target`. `by` names the count (see `MEASURES`).

    One number multiplies all widths (see `widths`); each product is rounded up or down. Layers of equal width stay
    equal, so that residual sums still fit. If several counts are equally near, take the widths nearest to their
    original proportions. At most about `MOST_CHOICES` roundings are tried, near the multiplier that meets the target.

    Raises UserError if `target` cannot be reached (for example, if all widths are 1 and the count is still higher), if
    the model has no width to change, or if it has more than `MOST_WIDTHS` different widths.
    """
    if by not in MEASURES:
        raise UserError(f"no measure {by!r} to match by; there are: {', '.join(MEASURES)}")
    if target < 1:
        raise UserError(f"a budget must be at least 1, not {target}")
    bases = widths(model)

    def counted(sizes: tuple[int, ...]) -> int:
        try:
            found: int = getattr(count(_with_widths(model, dict(zip(bases, sizes, strict=True))), input_shape), by)
        except UserError as error:  # a residual around the input must keep the input's channels
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

    # `low`: least multiplier that reaches the target if widths are rounded up. `high`: greatest multiplier that does
    # not exceed the target if widths are rounded down. Solutions lie between. Counts grow with widths, so bisect.
    limit = Fraction(LARGEST, bases[0])
    low, _ = _turn(lambda m: value(_rounded(bases, m, math.ceil)) >= target, limit)
    _, high = _turn(lambda m: value(_rounded(bases, m, math.floor)) > target, limit)
    # Many widths or a wide layer can give too many candidates. Then try only the candidates near `middle`.
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
    """Return a function that computes the counts of `counted` in microseconds instead of milliseconds.

    A count is a quadratic polynomial of the widths, because each connection joins two layers. The counts at widths of
    1, 2 and 3 determine the polynomial.
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

    @cache  # neighbouring multipliers often give equal rounded widths
    def value(sizes: tuple[int, ...]) -> int:
        x = [size - 1 for size in sizes]
        alone = sum(n * (slope + half * n) for n, slope, half in zip(x, slopes, twice, strict=True))
        return base + alone + sum(mixed * x[i] * x[j] for i, j, mixed in products)

    return value


def _split(model: Model) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Split the layers into those whose widths may change, and the `Dense` that makes the outputs (if there is one)."""
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
    """Find two close multipliers between which `holds` becomes true. If it never does, return `limit` twice."""
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
    """Cut the range `low` to `high` where a multiplier makes a width a whole number. Yield the middle of each piece."""
    edges = {low, high}
    for width in bases:
        edges.update(Fraction(k, width) for k in range(math.ceil(low * width), math.floor(high * width) + 1))
    for first, last in itertools.pairwise(sorted(edges)):
        yield (first + last) / 2
