"""Pooling, alone and within a convolution, has the values and gradients of the stock operations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from problems import (
    conv,
    derivatives,
    each_form,
    few_draws,
    implementations,
    looped,
    needs_native,
    normal,
    pool_draws,
    problems,
    using,
)

from cnnlib import ops
from cnnlib.ops import kernels
from cnnlib.ops.geometry import Correlation
from cnnlib.ops.lowerings import correlations, fused_pooling
from cnnlib.spec.layers import MaxPool
from cnnlib.spec.window import pad_pairs


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


@pool_draws
@given(pools(), implementations)
def test_max_pool_has_the_values_and_derivatives_of_the_stock_operation(problem, implementation):
    shape, window, strides, padding, resolved = problem
    x, direction = normal(shape), normal(shape, seed=1)

    def pool(x):
        return ops.max_pool(x, window, strides, padding)

    def stock_pool(x):
        return windowed(x, -jnp.inf, lax.max, window, strides, resolved)

    @functools.partial(jax.jit, static_argnums=0)  # one program in place of many
    def of(pool, x):
        y, pull = jax.vjp(pool, x)
        gradient = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)
        return gradient, y, pull(gradient)[0]

    @jax.jit
    def more_of_ours(x, direction, gradient):
        along = (gradient * jax.jvp(pool, (x,), (direction,))[1]).sum()
        stacked = jax.vmap(lambda x: jax.vjp(pool, x)[1](gradient)[0])(jnp.stack([x, direction]))
        product = jax.jvp(jax.grad(lambda x: (pool(x) ** 2).sum() / 2), (x,), (direction,))[1]
        same = jax.jvp(lambda x: jax.vjp(pool, x)[1](pool(x))[0], (x,), (direction,))[1]
        return along, stacked, product, same

    gradient, expected, theirs = of(stock_pool, x)
    with using(implementation):
        _, y, ours = of(pool, x)
        along, stacked, product, same = more_of_ours(x, direction, gradient)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # random values do not tie
    # Forward mode is the transpose: the same number from either side.
    np.testing.assert_allclose(along, (theirs * direction).sum(), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(stacked[0], theirs, rtol=1e-6)
    np.testing.assert_allclose(product, same, rtol=1e-5, atol=1e-5)


@st.composite
def pooled_problems(draw):
    """A convolution and a pooling that fits its map."""
    x_shape, kernel_shape, arguments, resolved = draw(problems())
    map_shape = looped(np.zeros(x_shape), np.zeros(kernel_shape), arguments["strides"], resolved, arguments["dilation"])
    sizes = map_shape.shape[1:-1]
    window = tuple(draw(st.integers(1, min(3, n))) for n in sizes)
    strides = draw(st.sampled_from([None, *(tuple(step for _ in sizes) for step in (1, 2))]))
    padding = draw(st.sampled_from(["VALID", "SAME"]))
    return x_shape, kernel_shape, arguments, MaxPool(window, strides, padding)


@few_draws
@given(pooled_problems())
def test_a_convolution_and_its_pooling_in_one_are_what_they_are_one_by_one(problem):
    x_shape, kernel_shape, arguments, pool = problem
    xs, ks = normal((2, *x_shape)), normal((2, *kernel_shape))

    def together(x, k):
        return conv(x, k, **arguments, pool=pool)

    def apart(x, k):
        return ops.max_pool(conv(x, k, **arguments), pool.window_shape, pool.strides, pool.padding)

    def everything(of):
        gradient = jax.grad(lambda x, k: (of(x, k) ** 2).sum(), (0, 1))
        second = jax.jvp(gradient, (xs[0], ks[0]), (xs[1], ks[1]))[1]
        lanes = [
            jax.vmap(lambda x, k: derivatives.__wrapped__(of, x, k), axes)(*operands)
            for axes, operands in (
                ((0, 0), (xs, ks)),
                ((0, None), (xs, ks[0])),
                ((None, 0), (xs[0], ks)),
            )
        ]
        return derivatives.__wrapped__(of, xs[0], ks[0]), second, lanes

    with using("xla"):
        expected = jax.jit(lambda: everything(apart))()
    results = []
    if not kernels.register():
        with using("native"):
            results.append(jax.jit(lambda: everything(together))())
    # What a program that was traced for a CPU computes on another platform.
    with using("gpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_pooling, "pools_within", lambda *_: True)
        results.append(jax.jit(lambda: everything(together))())
    for found in results:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), found, expected)


@pytest.mark.parametrize(
    "size, channels, features, window, padding, chosen",
    [
        ((14, 14), 6, 16, 5, 0, True),  # LeNet-5's second
        ((14, 14), 32, 64, 3, 1, False),  # two_conv's second
        ((40, 40), 3, 64, 3, 1, True),
        ((14, 14), 8, 6, 3, 1, False),
    ],
)
def test_few_channels_are_scattered_to(size, channels, features, window, padding, chosen):
    correlation = Correlation((1, 1), ((padding, padding),) * 2, (1, 1), (1, 1))
    gradient = jax.ShapeDtypeStruct((1, 8, *correlation.output_size(size, (window, window)), features), jnp.float32)
    kernel = jax.ShapeDtypeStruct((1, window, window, channels, features), jnp.float32)
    assert correlations.scatters(gradient, kernel, size, correlation) == chosen


@needs_native
def test_values_that_tie_behind_a_convolution_share_the_gradient_too():
    x, kernel = jnp.ones((3, 6, 6, 1)), jnp.ones((2, 2, 1, 5))
    with using("native"):
        y, pull = jax.vjp(lambda x, k: ops.conv2d(x, k, padding="VALID", pool=MaxPool(2)), x, kernel)
        to_x, to_kernel = pull(jnp.ones_like(y))
        np.testing.assert_array_equal(y, np.full((3, 2, 2, 5), 4.0))
        # 16 places of the map get a quarter of a window's gradient each; the last row and column are in no window.
        np.testing.assert_allclose(to_kernel, np.full((2, 2, 1, 5), 3 * 16 / 4))
        np.testing.assert_allclose(to_x.sum(axis=(1, 2, 3)), np.full(3, 16 / 4 * 4 * 5))
        along = jax.jvp(lambda k: ops.conv2d(x, k, padding="VALID", pool=MaxPool(2)), (kernel,), (kernel,))[1]
        np.testing.assert_array_equal(along, y)


@pytest.mark.once
@needs_native
@pytest.mark.parametrize("padding", ["VALID", pytest.param("SAME", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "channels, features",
    [*(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 6), (16, 6), (64, 32))), (6, 16), (3, 20), (40, 3)],
)
def test_input_gradients_are_right_scattered_or_not(channels, features, padding):
    x, kernel = normal((5, 14, 12, channels)), normal((5, 3, channels, features))
    arguments = {"padding": padding, "dilation": (1, 2) if features == 20 else 1, "strides": 2 if features == 3 else 1}
    values = functools.partial(conv, **arguments, pool=MaxPool(2))
    with using("xla"):
        expected = derivatives(values, x, kernel)
    with using("native"):
        found = derivatives(values, x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, expected)


@pool_draws
@given(pools())
def test_avg_pool_has_the_values_and_gradients_of_the_stock_operation(problem):
    shape, window, strides, padding, resolved = problem
    x, area = normal(shape), np.prod(window)
    ours = derivatives(lambda x: ops.avg_pool(x, window, strides, padding), x)
    theirs = derivatives(lambda x: windowed(x, 0.0, lax.add, window, strides, resolved) / area, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


@each_form
def test_values_that_tie_share_the_gradient_of_their_window(implementation):
    x = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 9.0]]).reshape(1, 2, 3, 1)
    with using(implementation):
        tiled = jax.grad(lambda x: 3 * ops.max_pool(x, 2).sum())(x)
        np.testing.assert_allclose(tiled[0, ..., 0], [[1, 1, 0], [0, 1, 0]])  # the third column is in no window
        overlapping = jax.grad(lambda x: 3 * ops.max_pool(x, 2, 1).sum())(x)
        np.testing.assert_allclose(overlapping[0, ..., 0], [[1, 1, 0], [0, 1, 3]])
        along = jax.jvp(lambda x: ops.max_pool(x, 2), (x,), (jnp.arange(6.0).reshape(x.shape),))[1]
        np.testing.assert_allclose(along.ravel(), [(0 + 1 + 4) / 3])


@pytest.mark.once
@needs_native
@pytest.mark.parametrize("channels", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 16)), 6, 19])
@pytest.mark.parametrize("size, window", [((6, 8), 2), ((7, 9), 2), ((8, 8), 3), ((8, 5), (3, 1))])
def test_max_pool_is_right_for_every_width_of_vectors(channels, size, window):
    x = normal((3, *size, channels))
    per_axis = (window, window) if isinstance(window, int) else window
    expected, *theirs = derivatives(lambda x: windowed(x, -jnp.inf, lax.max, per_axis, None, ((0, 0), (0, 0))), x)
    with using("native"):
        y, *ours = derivatives(lambda x: ops.max_pool(x, window), x)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@each_form
def test_what_is_not_a_number_wins_the_pooling(implementation):
    with using(implementation):
        for place in range(4):
            x = jnp.zeros(4).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
            assert jnp.isnan(ops.max_pool(x, 2)).all()


@each_form
def test_padding_never_wins_even_among_minus_infinities(implementation):
    x = jnp.full((1, 3, 3, 1), -jnp.inf)
    with using(implementation):
        pool = lambda x: ops.max_pool(x, 2, 1, 1)  # noqa: E731
        y, pull = jax.vjp(pool, x)
        gradient = jnp.arange(16.0).reshape(1, 4, 4, 1)
        (back,) = pull(gradient)
        assert (y == -jnp.inf).all()
        np.testing.assert_allclose(back.sum(), gradient.sum())
        direction = normal(x.shape)
        along = jax.jvp(pool, (x,), (direction,))[1]
        np.testing.assert_allclose((along * gradient).sum(), (back * direction).sum(), rtol=1e-5)


@each_form
def test_a_batch_of_nothing_has_a_gradient_of_zero(implementation):
    kernel = normal((3, 3, 2, 4))
    with using(implementation):
        gradient = jax.grad(lambda k: conv(jnp.zeros((0, 5, 5, 2)), k).sum())(kernel)
        np.testing.assert_array_equal(gradient, jnp.zeros_like(kernel))
        assert ops.max_pool(jnp.zeros((0, 4, 4, 2)), 2).shape == (0, 2, 2, 2)
        stacked = jax.vmap(conv)(jnp.zeros((2, 0, 5, 5, 2)), jnp.stack([kernel] * 2))
        assert stacked.shape == (2, 0, 5, 5, 4)
