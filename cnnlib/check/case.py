"""One operation to check: its inputs and the result that NumPy expects in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

Precision = Literal["default", "high", "highest"]
Lowering = Callable[..., Any]

LANES = 3


class Expected(NamedTuple):
    """An exact result, and what determines how far rounding may move a result from it."""

    value: np.ndarray
    magnitude: np.ndarray
    """For each value, the sum of the magnitudes of its terms."""
    terms: np.ndarray | float
    """Number of terms per value."""
    spread: np.ndarray | None = None
    """If the terms are products: the square root of the sum of their squares. A backend may round the factors first.
    That changes each term independently, and the sum in proportion to `spread`."""


class Case(NamedTuple):
    """An operation on arrays of one size, with its reference."""

    operation: str
    size: str
    function: Callable[..., jax.Array]
    """The operation for one lane. It takes the lane's `arguments`."""
    arguments: tuple[np.ndarray, ...]
    """Float32 arrays with a leading lane axis. Integer arrays are passed on unchanged."""
    reference: Callable[..., Sequence[Expected]]
    """Maps a lane's arguments and the gradient of its result, in float64, to the exact result and gradients."""
    gradients: int
    """Number of leading arguments to differentiate with respect to."""
    sums_in_own_type: bool = False
    """Whether sums of bfloat16 values are rounded to bfloat16 after each addition, instead of summed in float32."""
    has_bfloat16: bool = True
    """Whether training also runs the operation in bfloat16. If False, only in float32."""
