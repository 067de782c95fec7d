"""Define a case: one operation to check, its inputs, and the result that NumPy computes in float64."""

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
    """An exact result, and properties of its sums. The properties determine how large a rounding error may be."""

    value: np.ndarray
    magnitude: np.ndarray
    """Each value of the result is a sum of terms. `magnitude` is the sum of the terms' absolute values."""
    terms: np.ndarray | float
    """Number of terms per value."""
    spread: np.ndarray | None = None
    """The square root of the sum of the squared terms, if the terms are products. A backend may round the factors of
    each product first. The errors of this rounding are independent, so the error of the sum is proportional to
    `spread`."""


class Case(NamedTuple):
    """An operation on arrays of one size, and the reference that its results must match."""

    operation: str
    size: str
    function: Callable[..., jax.Array]
    """The operation for one lane. It takes the lane's part of `arguments`."""
    arguments: tuple[np.ndarray, ...]
    """Float32 or integer arrays with a leading lane axis. Integers are never converted to another type."""
    reference: Callable[..., Sequence[Expected]]
    """Takes a lane's arguments and the gradient of its result, in float64. Returns the exact result and gradients."""
    gradients: int
    """Number of arguments, counted from the first one, whose gradients are checked."""
    sums_in_own_type: bool = False
    """Whether sums of bfloat16 values are rounded to bfloat16 after each addition. If False, sums are in float32."""
    has_bfloat16: bool = True
    """Whether training also runs the operation in bfloat16. If False, training runs the operation only in float32."""
