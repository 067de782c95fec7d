"""Check windows that slide over an input, and convert their sizes, strides, dilations and paddings to one form."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from cnnlib.errors import UserError

Shape = tuple[int, ...]
PerAxis = int | tuple[int, ...]
Padding = str | int | tuple[tuple[int, int], ...]
PerAxisLike = SupportsIndex | Sequence[SupportsIndex]
"""Input that can become a `PerAxis`: NumPy integers and lists are allowed too."""
PaddingLike = str | SupportsIndex | Sequence[SupportsIndex | Sequence[SupportsIndex]]
"""Input that can become a `Padding`: lower case, NumPy integers, lists, and one number per axis are allowed too."""
LARGEST = 1_000_000
"""Upper bound of sizes, strides, dilations, paddings and features, so that XLA can index the shapes."""


def per_axis(value: PerAxis, axes: int, what: str) -> tuple[int, ...]:
    """Return one number per axis; an int is repeated for every axis. Raises UserError if `value` has another length."""
    if isinstance(value, int):
        return (value,) * axes
    if len(value) != axes:
        raise UserError(f"{what} {'x'.join(map(str, value))} has {len(value)} axes, its input has {axes}")
    return value


def pad_pairs(
    padding: Padding, size: Shape, window: Shape, strides: Shape, dilation: Shape
) -> tuple[tuple[int, int], ...]:
    """Return the number of zeros before and after each spatial axis.

    `SAME` gives ceil(size / stride) outputs. If the number of zeros is odd, the end gets one more, as in XLA and
    TensorFlow. `VALID` pads nothing. An int pads every side. Pairs are returned unchanged. Raises UserError if the
    number of pairs is not the number of axes.
    """
    if isinstance(padding, int):
        return ((padding, padding),) * len(size)
    if isinstance(padding, tuple):
        if len(padding) != len(size):
            raise UserError(f"padding {padding} has {len(padding)} axes, its input has {len(size)}")
        return padding
    if padding == "VALID":
        return ((0, 0),) * len(size)
    pairs = []
    for n, k, s, d in zip(size, window, strides, dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


@dataclass(frozen=True)
class Window:
    """A window placed over a map. Every field has one entry per spatial axis."""

    input_size: Shape
    size: Shape
    strides: Shape
    dilation: Shape
    padding: tuple[tuple[int, int], ...]

    @functools.cached_property
    def output_size(self) -> Shape:
        """Positions per axis: floor((n + zeros - span) / stride) + 1.

        n is the input size, zeros is the padding on both sides together, and k is the window size. The span is (k - 1)
        * dilation + 1.
        """
        return tuple(
            (n + low + high - ((k - 1) * d + 1)) // s + 1
            for n, k, s, d, (low, high) in zip(
                self.input_size, self.size, self.strides, self.dilation, self.padding, strict=True
            )
        )

    @functools.cached_property
    def taps_inside(self) -> int:
        """Number of taps (places of the window), over all positions, that fall on the map and not on its padding."""
        product = 1
        for n, k, s, d, (low, _), outputs in zip(
            self.input_size, self.size, self.strides, self.dilation, self.padding, self.output_size, strict=True
        ):
            inside = 0
            for tap in range(k):
                first = max(0, math.ceil((low - tap * d) / s))
                last = min(outputs - 1, (n - 1 + low - tap * d) // s)
                inside += max(0, last - first + 1)
            product *= inside
        return product


def window_over(
    input_shape: Shape, what: str, size: PerAxis, strides: PerAxis, dilation: PerAxis, padding: Padding
) -> Window:
    """Return a layer's window over a map `(*spatial, channels)`. Raises UserError if the window does not fit."""
    spatial = input_shape[:-1]
    if not spatial:
        raise UserError(f"{what} needs a map with spatial axes, its input is a vector of {input_shape[0]}")
    axes = len(spatial)
    sizes = per_axis(size, axes, "window")
    steps = per_axis(strides, axes, "stride")
    spread = per_axis(dilation, axes, "dilation")
    pairs = pad_pairs(padding, spatial, sizes, steps, spread)
    for n, k, d, (low, high) in zip(spatial, sizes, spread, pairs, strict=True):
        span = (k - 1) * d + 1
        if span > n + low + high:
            raise UserError(f"{what} spans {span}, its map has only {n + low + high} ({n} and {low + high} of padding)")
        # SAME pads for any kernel. Deep nets have 3 taps on a map of 1. With larger spans, most taps meet no node.
        if span > 2 * n + 1:
            raise UserError(f"{what} spans {span}, its map has only {n}")
    return Window(spatial, sizes, steps, spread, pairs)


def pool_window(
    input_shape: Shape, what: str, window_shape: PerAxis, strides: PerAxis | None, padding: Padding
) -> Window:
    """Return the window of a pooling layer. Raises UserError if it does not fit, or if it could see only padding."""
    window = window_over(input_shape, what, window_shape, window_shape if strides is None else strides, 1, padding)
    for k, pair in zip(window.size, window.padding, strict=True):
        if max(pair) >= k:
            raise UserError(
                f"{what} has padding of {max(pair)}: it must be less than the window, or one sees nothing else"
            )
    return window


def axes_text(value: PerAxis) -> str:
    """Return one number, or one per axis, as text: `5` or `5x3`."""
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


def padding_text(padding: Padding) -> str:
    """Return padding in the notation of models, for example `same`, `2` or `1+2x0+0`."""
    if isinstance(padding, tuple):
        return "x".join(f"{low}+{high}" for low, high in padding)
    return str(padding).lower()


def whole(value: Any) -> int:
    """Convert a whole number of any integer type to an int. Raises TypeError for anything else, including a bool."""
    if isinstance(value, bool | np.bool_):  # NumPy 2.1 still turns np.bool_ into 1, with a warning
        raise TypeError
    return operator.index(value)


def count_of(value: Any, what: str) -> int:
    """Convert a whole number from 1 to `LARGEST` to an int. Raises UserError for anything else."""
    try:
        count = whole(value)
    except TypeError:
        raise UserError(f"{what} must be one whole number, not {_shortened(value)}") from None
    if not 1 <= count <= LARGEST:
        raise UserError(f"{what} must be in 1..{LARGEST:,}, not {count}")
    return count


def whole_per_axis(value: Any, what: str) -> PerAxis:
    """Convert one whole number to an int, or one number per axis to a tuple. Raises UserError for anything else."""
    with contextlib.suppress(TypeError):
        return whole(value)
    with contextlib.suppress(TypeError):
        return tuple(whole(number) for number in value)
    raise UserError(f"{what} must be a whole number or one per axis, not {_shortened(value)}")


def padding_of(value: Any, name: str) -> Padding:
    """Convert padding to the form that layers store. Raises UserError if `value` is not a padding.

    Args:
        value: `"SAME"` or `"VALID"`, in upper or lower case; one whole number for all sides; or, per axis, a whole
            number or a pair (before, after).
        name: Name of the layer, for the error message.
    """
    if isinstance(value, str) and value.upper() in ("SAME", "VALID"):
        return value.upper()
    if not isinstance(value, str):
        with contextlib.suppress(TypeError):
            return whole(value)
        with contextlib.suppress(TypeError, ValueError):  # ValueError: not two numbers
            return tuple(_before_and_after(one) for one in value)
    raise UserError(
        f"{name}: padding must be SAME, VALID, a whole number, or a number or a pair per axis, not {_shortened(value)}"
    )


def _before_and_after(value: Any) -> tuple[int, int]:
    """Return a pair of whole numbers; a single number is repeated. Raises TypeError or ValueError for anything else."""
    with contextlib.suppress(TypeError):
        return whole(value), whole(value)
    before, after = value
    return whole(before), whole(after)


def _shortened(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def window_arguments(name: str, numbers: Mapping[str, object], padding: Any) -> tuple[dict[str, PerAxis], Padding]:
    """Convert the arguments of a layer's window to the form that layers store.

    Raises UserError if a number is not whole, if it is not between 1 and `LARGEST`, or if no map can have this padding.
    """
    kept = {what: whole_per_axis(value, f"{name}: {what}") for what, value in numbers.items()}
    for what, value in kept.items():
        if not all(1 <= v <= LARGEST for v in ((value,) if isinstance(value, int) else value)):
            raise UserError(f"{name}: {what} must be in 1..{LARGEST:,}, not {axes_text(value)}")
    pads = padding_of(padding, name)
    pairs = ((pads,),) if isinstance(pads, int) else pads
    if not isinstance(pairs, str) and not all(0 <= v <= LARGEST for pair in pairs for v in pair):
        raise UserError(f"{name}: padding must be in 0..{LARGEST:,}, not {padding_text(pads)}")
    return kept, pads


def set_fields(instance: object, **fields: object) -> None:
    """Set fields of a frozen dataclass in its `__post_init__`."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


def shape_text(shape: Shape) -> str:
    """Return a shape in the notation of the command line, such as `28x28x1`."""
    return "x".join(map(str, shape))
