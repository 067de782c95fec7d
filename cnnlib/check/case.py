"""One operation to check: its inputs and the result that NumPy expects in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

Precision = Literal["default", "high", "highest"]
Lowering = Callable[..., Any]

LANES = 3
"""Number of lanes per case. A lane is one of the models that are trained together."""


class Expected(NamedTuple):
    """An exact result, and the properties of its sums that determine how large a rounding error may be."""

    value: np.ndarray
    magnitude: np.ndarray
    """Each value is a sum of terms; this is the sum of their absolute values."""
    terms: np.ndarray | float
    """Number of terms per value."""
    spread: np.ndarray | None = None
    """If the terms are products: the square root of the sum of the squared terms. A backend may round the factors of
    each product first. These errors are independent, so the error of the sum is proportional to `spread`."""


class Case(NamedTuple):
    """An operation on arrays of one size, with its reference."""

    operation: str
    size: str
    function: Callable[..., jax.Array]
    """The operation for one lane. It takes the lane's part of `arguments`."""
    arguments: tuple[np.ndarray, ...]
    """Float32 or integer arrays with a leading lane axis. Integers are never converted to another type."""
    reference: Callable[..., Sequence[Expected]]
    """Maps a lane's arguments and the gradient of the lane's result, in float64, to the exact result and gradients."""
    gradients: int
    """Number of leading arguments to differentiate with respect to."""
    sums_in_own_type: bool = False
    """True if sums of bfloat16 values are rounded to bfloat16 after each addition. False if sums are in float32."""
    has_bfloat16: bool = True
    """Whether training also runs the operation in bfloat16. If False, training runs the operation only in float32."""
