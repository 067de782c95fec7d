"""Run operations in every form that training uses, and compare their results with the exact results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cnnlib.check.case import LANES, Case, Expected, Lowering, Precision
from cnnlib.check.cases import normal, quick_cases
from cnnlib.train.step import over_lanes

PRODUCT_BITS = {
    "cpu": {"default": 24, "high": 24, "highest": 24},
    "gpu": {"default": 11, "high": 11, "highest": 24},
    "tpu": {"default": 8, "high": 16, "highest": 24},
}
"""Number of significant bits of the factors of a float32 product, per platform and precision. A GPU uses TF32. A TPU
uses one or three passes of bfloat16 (see the documentation of `jax.lax.Precision`)."""
SPREAD = 4.0
"""Allowed error of a sum of independent roundings, in standard deviations of that sum."""
TINY = 1e-30
"""Absolute tolerance. It matters for values that are exactly zero."""
SLACK = 64.0
"""Allowed error of the operations on single values (exp, log, tanh, division, square root), in units of one rounding
error."""


class Found(NamedTuple):
    """The result of checking a case in one form (see `FORMS`) and one floating-point type."""

    operation: str
    form: str
    dtype: str
    size: str
    error: float
    """The largest error, in units of the tolerance: at most 1 if the backend is correct."""

    @property
    def is_wrong(self) -> bool:
        """Whether the error is NaN or larger than rounding explains."""
        return not self.error <= 1.0


FORMS: dict[str, Callable[[Lowering], Lowering]] = {
    "forward": jax.vmap,
    "one": lambda function: lambda *lanes: jax.tree.map(lambda y: y[None], function(*(lane[0] for lane in lanes))),
    "vmap": jax.vmap,
    "scan": lambda function: lambda *lanes: jax.lax.scan(lambda n, lane: (n + 1, function(*lane)), 0, lanes)[1],
    "map": lambda function: over_lanes(function, at_a_time=2, lane_arguments=99),
}
"""Each form runs a function of one lane over several lanes. `one` runs only the first lane, `vmap` runs all lanes
vectorised, `scan` runs one lane after another, and `map` runs two lanes at a time. `forward` is `vmap` without
gradients, as in evaluation. The compiler may fuse operations in a different way if there are no gradients."""


class Prepared(NamedTuple):
    """A case, its arguments in one floating-point type, and the exact results for these arguments."""

    case: Case
    dtype: str
    arguments: tuple[np.ndarray, ...]
    cotangent: np.ndarray
    """The gradient of the result, per lane."""
    expected: list[Sequence[Expected]]
    """The exact result and gradients, per lane."""


def check(
    chosen: Sequence[Case], forms: Sequence[str], dtypes: Sequence[str], precision: Precision = "default"
) -> Iterator[Found]:
    """Run cases on JAX's default device.

    Compile one program per combination of case, form and type, and yield one `Found` for it.
    """
    for case in chosen:
        for dtype in dtypes:
            if dtype == "float32" or case.has_bfloat16:
                one = prepared(case, dtype)
                for form in forms:
                    yield from run([one], form, precision)


def quick_check(precision: Precision = "default") -> list[Found]:
    """Run `quick_cases` in one program, in the form that training mostly uses: `scan` on a CPU, `vmap` elsewhere."""
    form = "scan" if jax.default_backend() == "cpu" else "vmap"
    return run([prepared(case, "float32") for case in quick_cases()], form, precision)


def prepared(case: Case, dtype: str) -> Prepared:
    """Round a case's arguments to `dtype`. Compute the exact results for the rounded arguments in float64."""
    arguments = tuple(rounded(argument, dtype) for argument in case.arguments)
    shape = jax.eval_shape(case.function, *(argument[0] for argument in arguments)).shape
    cotangent = rounded(normal(f"cotangent of {case.operation}, {case.size}", LANES, *shape), dtype)
    exact = [a.astype(np.float64) if a.dtype.kind not in "iu" else a for a in (*arguments, cotangent)]
    expected = [case.reference(*(a[lane] for a in exact)) for lane in range(LANES)]
    return Prepared(case, dtype, arguments, cotangent, expected)


def run(chosen: Sequence[Prepared], form: str, precision: Precision) -> list[Found]:
    """Compile cases into one program, run it, and compare the results."""

    def program(arguments: Sequence[tuple[PyTree, ...]], cotangents: Sequence[PyTree]) -> list[PyTree]:
        return [
            FORMS[form](forward(one.case) if form == "forward" else with_gradients(one.case))(*own, cotangent)
            for one, own, cotangent in zip(chosen, arguments, cotangents, strict=True)
        ]

    with jax.default_matmul_precision(precision):
        results = jax.jit(program)([one.arguments for one in chosen], [one.cotangent for one in chosen])
    platform = jax.default_backend()
    return [
        Found(one.case.operation, form, one.dtype, one.case.size, largest_error(one, got, platform, precision))
        for one, got in zip(chosen, jax.device_get(results), strict=True)
    ]


def forward(case: Case) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function of one lane that computes only the operation's result."""
    return lambda *arguments: (case.function(*arguments[:-1]),)


def with_gradients(case: Case) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function of one lane that computes the operation's result and gradients."""

    def function(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        *own, cotangent = arguments
        moving, fixed = own[: case.gradients], own[case.gradients :]
        y, back = jax.vjp(lambda *moving: case.function(*moving, *fixed), *moving)
        return (y, *back(cotangent))

    return function


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round a float32 array to `dtype`. Return integer arrays unchanged."""
    return array.astype(jnp.dtype(dtype)) if array.dtype == np.float32 else array


def largest_error(one: Prepared, results: Sequence[np.ndarray], platform: str, precision: Precision) -> float:
    """Return the largest error of a case over its lanes and results, in units of the tolerance."""
    own, single = 2.0**-8 if one.dtype == "bfloat16" else 2.0**-24, 2.0**-24
    factor = 2.0 ** -PRODUCT_BITS.get(platform, PRODUCT_BITS["tpu"])[precision]
    addition = own if one.case.sums_in_own_type else single
    worst = 0.0
    for lane in range(len(results[0])):
        for got, expected in zip(results, one.expected[lane], strict=False):  # the form `forward` has no gradients
            relative = (SPREAD * np.sqrt(expected.terms) + SLACK) * addition
            tolerance = expected.magnitude * relative + 2 * own * np.abs(expected.value)
            if expected.spread is not None:
                tolerance = tolerance + 2 * SPREAD * max(0.0, factor - own) * expected.spread
            error = np.abs(got[lane].astype(np.float64) - expected.value) / (tolerance + TINY)
            worst = max(worst, float(np.max(error, initial=0.0)) if np.isfinite(error).all() else np.inf)
    return worst
