"""Problems for the operations: shapes and arguments that fit, and all implementations."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from jax import lax

from cnnlib import ops
from cnnlib.nn import network
from cnnlib.ops import kernels
from cnnlib.spec.window import pad_pairs

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


# As cnnlib.nn.network has them, each in one program in place of one per operation.
initial = jax.jit(network.initial, static_argnums=(0, 2))
logits = jax.jit(network.logits, static_argnums=0)
training_logits = jax.jit(network.training_logits, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def derivatives(function, *inputs):
    """Its value, its gradients along a random direction, and its derivative along others; in one program."""
    y, pull = jax.vjp(function, *inputs)
    directions = tuple(normal(x.shape, seed=2 + i) for i, x in enumerate(inputs))
    return y, pull(normal(y.shape, seed=1)), jax.jvp(function, inputs, directions)[1]


draws = settings(max_examples=12, deadline=None)
pool_draws = settings(max_examples=5, deadline=None)
few_draws = settings(max_examples=3, deadline=None)  # each compiles several programs


def conv(x, kernel, **arguments):
    return {3: ops.conv1d, 4: ops.conv2d}[x.ndim](x, kernel, **arguments)


def looped(x, kernel, strides, resolved, dilation):
    """A convolution as its definition says it: at each position the sum over taps and channels."""
    x = np.pad(x, [(0, 0), *resolved, (0, 0)])
    window = kernel.shape[:-2]
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    size = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, strides, strict=True)]
    y = np.zeros((x.shape[0], *size, kernel.shape[-1]))
    for place in itertools.product(*map(range, size)):
        for tap in itertools.product(*map(range, window)):
            at = tuple(p * s + t * d for p, s, t, d in zip(place, strides, tap, dilation, strict=True))
            y[(slice(None), *place)] += x[(slice(None), *at)] @ kernel[tap]
    return y


def stock(x, kernel, strides, resolved, dilation):
    dimensions = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}[x.ndim]
    return lax.conv_general_dilated(x, kernel, strides, resolved, None, dilation, dimensions)
