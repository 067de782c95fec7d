"""Problems for the operations: shapes and arguments that fit, and all implementations."""

from __future__ import annotations

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from cnnlib import kernels, models
from cnnlib.spec import pad_pairs

# The CPU's own implementations, where this machine has both, and the forms of accelerators.
implementations = st.sampled_from(["xla", "gpu", "tpu", *([] if kernels.register() else ["native"])])


@contextlib.contextmanager
def using(implementation):
    """Inside, operations on the CPU run on these kernels."""
    before = os.environ.get("CNNLIB_KERNELS")
    os.environ["CNNLIB_KERNELS"] = implementation
    try:
        yield
    finally:
        if before is None:
            del os.environ["CNNLIB_KERNELS"]
        else:
            os.environ["CNNLIB_KERNELS"] = before


NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(kernels.register()), reason="no compiler"))


def each_implementation(test):
    """The test runs on XLA's kernels and on those of kernels.cc."""
    return pytest.mark.parametrize("implementation", ["xla", NATIVE])(test)


def each_form(test):
    """The test runs on both, and in the forms of accelerators."""
    return pytest.mark.parametrize("implementation", ["xla", NATIVE, "gpu", "tpu"])(test)


def each_form_in_time(test):
    """The test runs on both. In the forms of accelerators it is a slow test."""
    others = [pytest.param(form, marks=pytest.mark.slow) for form in ("gpu", "tpu")]
    return pytest.mark.parametrize("implementation", ["xla", NATIVE, *others])(test)


def needs_native(test):
    """The test is about kernels.cc, and left out where no compiler is."""
    return pytest.mark.skipif(bool(kernels.register()), reason="no compiler")(test)


@st.composite
def problems(draw):
    """Shapes of x and kernel, and the arguments of a convolution that fits; paddings also resolved to pairs."""
    n = draw(st.sampled_from([1, 2]))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(n))  # noqa: E731
    size, window, strides, dilation = numbers(1, 8), numbers(1, 4), numbers(1, 3), numbers(1, 2)
    pairs = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(n))
    padding = draw(st.sampled_from(["SAME", "VALID", draw(st.integers(0, 3)), pairs]))
    resolved = pad_pairs(padding, size, window, strides, dilation)
    for m, k, d, pair in zip(size, window, dilation, resolved, strict=True):
        assume((k - 1) * d + 1 <= min(m + sum(pair), 2 * m + 1))
    # Both sides of the few-channel rule, and batches that do and do not divide into blocks.
    inputs, outputs, batch = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 7]))
    arguments = {"strides": strides, "padding": padding, "dilation": dilation}
    return (batch, *size, inputs), (*window, inputs, outputs), arguments, resolved


def normal(shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), jnp.float32)


# As cnnlib.models has them, each in one program in place of one per operation.
initial = jax.jit(models.initial, static_argnums=(0, 2))
logits = jax.jit(models.logits, static_argnums=0)
training_logits = jax.jit(models.training_logits, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def derivatives(function, *inputs):
    """Its value, its gradients along a random direction, and its derivative along others; in one program."""
    y, pull = jax.vjp(function, *inputs)
    directions = tuple(normal(x.shape, seed=2 + i) for i, x in enumerate(inputs))
    return y, pull(normal(y.shape, seed=1)), jax.jvp(function, inputs, directions)[1]
