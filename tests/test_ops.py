"""The operations against loops in NumPy, against lax, and against finite differences, over random shapes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from cnnlib import ops
from cnnlib.errors import UserError
from cnnlib.spec import pad_pairs

draws = settings(max_examples=20, deadline=None)
few_draws = settings(max_examples=6, deadline=None)  # each compiles several programs


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


@draws
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_same_padding_is_that_of_xla(n, k, s, d):
    ((low, high),) = lax.padtype_to_pads((n,), ((k - 1) * d + 1,), (s,), "SAME")
    assert pad_pairs("SAME", (n,), (k,), (s,), (d,)) == ((low, high),)


@draws
@given(problems())
def test_conv_equals_its_definition(problem):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)
    y = ops.conv(x, kernel, **arguments)
    expected = looped(np.asarray(x), np.asarray(kernel), arguments["strides"], resolved, arguments["dilation"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@draws
@given(problems())
def test_conv_has_the_gradients_of_the_stock_operation(problem):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)
    y, ours = jax.vjp(lambda x, k: ops.conv(x, k, **arguments), x, kernel)
    _, theirs = jax.vjp(lambda x, k: stock(x, k, arguments["strides"], resolved, arguments["dilation"]), x, kernel)
    gradient = normal(y.shape, seed=1)
    for mine, other in zip(ours(gradient), theirs(gradient), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [1, 5])
def test_conv_gradients_are_finite_differences_in_float64(inputs, float64):
    random = np.random.RandomState(0)
    x, kernel = jnp.asarray(random.normal(size=(2, 7, 6, inputs))), jnp.asarray(random.normal(size=(3, 2, inputs, 3)))
    weight = random.normal(size=(2, 4, 5, 3))

    def value(x, kernel):
        y = ops.conv(x, kernel, strides=(2, 1), padding=((1, 2), (0, 0)), dilation=(2, 1))
        return (jnp.sin(y)[:, :3] * weight[:, :3]).sum()

    gradients = jax.grad(value, (0, 1))(x, kernel)
    for which, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)
        step = 1e-5 * direction
        above = [x, kernel]
        below = [x, kernel]
        above[which], below[which] = above[which] + step, below[which] - step
        difference = (value(*above) - value(*below)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=1e-7)


@few_draws
@given(problems())
def test_conv_is_the_same_under_vmap_over_weights_over_inputs_and_in_a_loop(problem):
    x_shape, kernel_shape, arguments, _ = problem
    xs, kernels = normal((2, *x_shape)), normal((2, *kernel_shape))

    def value_and_gradients(x, kernel):
        y, pull = jax.vjp(lambda x, k: ops.conv(x, k, **arguments), x, kernel)
        return y, pull(jnp.ones_like(y))

    alone = [value_and_gradients(x, kernel) for x, kernel in zip(xs, kernels, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    over_both = jax.vmap(value_and_gradients)(xs, kernels)
    in_a_loop = jax.jit(lambda pair: lax.map(lambda p: value_and_gradients(*p), pair))((xs, kernels))
    over_weights = jax.vmap(value_and_gradients, (None, 0))(xs[0], kernels)
    for result in (over_both, in_a_loop):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), result, expected)
    np.testing.assert_allclose(over_weights[0][0], expected[0][0], rtol=1e-4, atol=1e-4)


def test_conv_commutes_with_shifts_away_from_the_border():
    x, kernel = normal((1, 12, 12, 2)), normal((3, 3, 2, 4))
    moved = jnp.roll(x, (2, 1), axis=(1, 2))
    y, y_moved = ops.conv(x, kernel), ops.conv(moved, kernel)
    np.testing.assert_allclose(y_moved[:, 3:-1, 2:-1], y[:, 1:-3, 1:-2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [1, 5])
def test_bfloat16_stays_bfloat16_and_near(inputs):
    x, kernel = normal((4, 8, 8, inputs)), normal((3, 3, inputs, 4))

    def gradients(dtype):
        y, pull = jax.vjp(ops.conv, x.astype(dtype), kernel.astype(dtype))
        return y, *pull(jnp.ones_like(y))

    for narrow, wide in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=0.05, atol=0.25)


def test_forward_mode_says_that_it_is_not_there():
    x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((2, 2, 1, 1))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda k: ops.conv(x, k), (kernel,), (kernel,))


@st.composite
def pools(draw):
    shape, _, arguments, _ = draw(problems())
    axes = len(shape) - 2
    window = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    strides = draw(st.sampled_from([None, arguments["strides"]]))
    padding = arguments["padding"]
    resolved = pad_pairs(padding, shape[1:-1], window, strides or window, (1,) * axes)
    for m, k, pair in zip(shape[1:-1], window, resolved, strict=True):
        # A window that sees padding alone has no largest value.
        assume(k <= min(m + sum(pair), 2 * m + 1) and max(pair) < k)
    return shape, window, strides, padding, resolved


def windowed(x, init, operation, window, strides, resolved):
    strides = strides or window
    return lax.reduce_window(x, init, operation, (1, *window, 1), (1, *strides, 1), [(0, 0), *resolved, (0, 0)])


@draws
@given(pools())
def test_max_pool_has_the_values_and_gradients_of_the_stock_operation(problem):
    shape, window, strides, padding, resolved = problem
    x = normal(shape)
    y, ours = jax.vjp(lambda x: ops.max_pool(x, window, strides, padding), x)
    expected, theirs = jax.vjp(lambda x: windowed(x, -jnp.inf, lax.max, window, strides, resolved), x)
    np.testing.assert_array_equal(y, expected)
    gradient = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)
    np.testing.assert_allclose(ours(gradient)[0], theirs(gradient)[0], rtol=1e-6)  # random values do not tie


@draws
@given(pools())
def test_avg_pool_has_the_values_and_gradients_of_the_stock_operation(problem):
    shape, window, strides, padding, resolved = problem
    x = normal(shape)
    y, ours = jax.vjp(lambda x: ops.avg_pool(x, window, strides, padding), x)
    area = np.prod(window)
    expected, theirs = jax.vjp(lambda x: windowed(x, 0.0, lax.add, window, strides, resolved) / area, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    gradient = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)
    np.testing.assert_allclose(ours(gradient)[0], theirs(gradient)[0], rtol=1e-5, atol=1e-5)


def test_values_that_tie_share_the_gradient_of_a_tiled_max_pool():
    x = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 9.0]]).reshape(1, 2, 3, 1)
    gradient = jax.grad(lambda x: 3 * ops.max_pool(x, 2).sum())(x)
    np.testing.assert_allclose(gradient[0, ..., 0], [[1, 1, 0], [0, 1, 0]])  # the third column is in no window


def test_what_does_not_fit_is_a_user_error():
    with pytest.raises(UserError, match="spans 5"):
        ops.conv(jnp.ones((1, 4, 4, 1)), jnp.ones((5, 5, 1, 1)), padding="VALID")
    with pytest.raises(UserError, match="spans 5"):
        ops.max_pool(jnp.ones((1, 4, 4, 1)), 5)
