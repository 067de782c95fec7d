"""The operations against loops in NumPy, against lax, and against finite differences, over random shapes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from problems import (
    conv,
    derivatives,
    draws,
    each_form,
    each_form_in_time,
    each_implementation,
    few_draws,
    implementations,
    looped,
    needs_native,
    normal,
    problems,
    stock,
    using,
)

from cnnlib import ops
from cnnlib.ops.geometry import Correlation
from cnnlib.ops.lowerings import blocks as blocks_module
from cnnlib.spec.window import pad_pairs


@draws
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_same_padding_is_that_of_xla(n, k, s, d):
    ((low, high),) = lax.padtype_to_pads((n,), ((k - 1) * d + 1,), (s,), "SAME")
    assert pad_pairs("SAME", (n,), (k,), (s,), (d,)) == ((low, high),)


@draws
@given(problems(), implementations)
def test_conv_equals_its_definition(problem, implementation):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)
    with using(implementation):
        y = jax.jit(lambda x, k: conv(x, k, **arguments))(x, kernel)
    expected = looped(np.asarray(x), np.asarray(kernel), arguments["strides"], resolved, arguments["dilation"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@draws
@given(problems(), implementations)
def test_conv_has_the_derivatives_of_the_stock_operation(problem, implementation):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)

    with using(implementation):
        ours = derivatives(lambda x, k: conv(x, k, **arguments), x, kernel)
    theirs = derivatives(lambda x, k: stock(x, k, arguments["strides"], resolved, arguments["dilation"]), x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), ours, theirs)


@pytest.mark.slow
@few_draws
@given(problems(), implementations)
def test_conv_has_the_second_derivatives_of_the_stock_operation(problem, implementation):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)
    directions = normal(x_shape, seed=2), normal(kernel_shape, seed=3)

    def products(conv):
        value = lambda x, k: jnp.sin(conv(x, k)).sum()  # noqa: E731
        gradient = jax.grad(value, (0, 1))
        forward_over_reverse = jax.jvp(gradient, (x, kernel), directions)[1]
        _, pull = jax.vjp(gradient, x, kernel)
        return forward_over_reverse, pull(directions)  # a Hessian is symmetric: both are its product with directions

    with using(implementation):
        ours = products(lambda x, k: conv(x, k, **arguments))
    theirs, _ = products(lambda x, k: stock(x, k, arguments["strides"], resolved, arguments["dilation"]))
    for product in ours:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-3), product, theirs)


@each_form_in_time
@pytest.mark.parametrize("padding", [((3, 0),), ((0, 3),), ((4, 1), (0, 2))])
def test_padding_beyond_the_kernel_has_a_gradient(implementation, padding):
    # XLA's CPU compiler reads beyond the maps of the convolution that is this gradient (openxla/xla issue 48713).
    size, window = ((10,), (2,)) if len(padding) == 1 else ((9, 10), (3, 2))
    x, kernel = normal((3, *size, 3)), normal((*window, 3, 8))
    with using(implementation):
        y, pull = jax.vjp(lambda x: conv(x, kernel, padding=padding), x)
        (gradient,) = pull(y)
    padded = np.zeros((3, *(n + sum(pair) for n, pair in zip(size, padding, strict=True)), 3))
    for tap in itertools.product(*map(range, window)):
        at = tuple(slice(t, t + n) for t, n in zip(tap, y.shape[1:-1], strict=True))
        padded[(slice(None), *at)] += np.asarray(y) @ np.asarray(kernel)[tap].T
    own = tuple(slice(low, low + n) for (low, _), n in zip(padding, size, strict=True))
    np.testing.assert_allclose(gradient, padded[(slice(None), *own)], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("inputs", [1, 5])
def test_conv_gradients_are_finite_differences_in_float64(inputs, float64):
    random = np.random.RandomState(0)
    x, kernel = jnp.asarray(random.normal(size=(2, 7, 6, inputs))), jnp.asarray(random.normal(size=(3, 2, inputs, 3)))
    weight = random.normal(size=(2, 4, 5, 3))

    @jax.jit
    def value(x, kernel):
        y = conv(x, kernel, strides=(2, 1), padding=((1, 2), (0, 0)), dilation=(2, 1))
        return (jnp.sin(y)[:, :3] * weight[:, :3]).sum()

    gradients = jax.jit(jax.grad(value, (0, 1)))(x, kernel)
    for which, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)
        above, below = ([np.asarray(x), np.asarray(kernel)] for _ in range(2))
        above[which], below[which] = above[which] + 1e-5 * direction, below[which] - 1e-5 * direction
        difference = (value(*above) - value(*below)) / 2e-5
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), difference, rtol=1e-7)


@pytest.mark.slow
@few_draws
@given(problems(), implementations)
def test_conv_is_the_same_under_every_transformation(problem, implementation):
    x_shape, kernel_shape, arguments, _ = problem
    xs, kernels = normal((2, *x_shape)), normal((2, *kernel_shape))

    def value_and_gradients(x, kernel):
        y, pull = jax.vjp(lambda x, k: conv(x, k, **arguments), x, kernel)
        return y, pull(jnp.cos(y))

    with using(implementation):
        alone = [[value_and_gradients(x, kernel) for kernel in kernels] for x in xs]
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(alone[i][i] for i in range(2)))
        over_both = jax.vmap(value_and_gradients)(xs, kernels)
        over_last_axes = jax.vmap(value_and_gradients, (-1, -1))(jnp.moveaxis(xs, 0, -1), jnp.moveaxis(kernels, 0, -1))
        mapped = jax.jit(lambda pair: lax.map(lambda p: value_and_gradients(*p), pair))((xs, kernels))
        rematerialised = jax.vmap(jax.checkpoint(value_and_gradients))(xs, kernels)
        over_weights = jax.vmap(value_and_gradients, (None, 0))(xs[0], kernels)
        over_inputs = jax.vmap(value_and_gradients, (0, None))(xs, kernels[1])
        nested = jax.vmap(lambda x: jax.vmap(lambda k: value_and_gradients(x, k))(kernels))(xs)

    def agree(result, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), result, expected)

    for result in (over_both, over_last_axes, mapped, rematerialised):
        agree(result, expected)
    for i in range(2):
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], over_weights), alone[0][i])
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], over_inputs), alone[i][1])
        for j in range(2):
            agree(jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], nested), alone[i][j])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    "size, window, features, arguments",
    [
        ((12, 8), (5, 5), 6, {}),  # blocks of 4x4
        ((11, 12), (3, 2), 3, {"padding": "VALID", "strides": (1, 2), "dilation": (2, 1)}),  # 7 rows, 6 columns
        ((12, 12), (3, 3), 16, {"strides": 2, "padding": ((2, 1), (0, 3))}),
        ((6, 6), (3, 3), 40, {}),  # blocks for the gradient of the kernel only
        ((5, 7), (3, 3), 7, {}),  # no block divides the outputs
        ((12,), (5,), 6, {}),  # a signal
    ],
)
def test_forms_of_accelerators_are_right_alone_and_with_other_lanes(platform, size, window, features, arguments):
    x, kernel = normal((3, 2, *size, 2)), normal((3, *window, 2, features))
    axes = len(size)
    plain = {"strides": 1, "padding": "SAME", "dilation": 1} | arguments
    strides, dilation = (
        (plain[name],) * axes if isinstance(plain[name], int) else plain[name] for name in ("strides", "dilation")
    )
    resolved = pad_pairs(plain["padding"], size, window, strides, dilation)
    reference = functools.partial(stock, strides=strides, resolved=resolved, dilation=dilation)
    expected = derivatives(reference, x[0], kernel[0]), derivatives(jax.vmap(reference), x, kernel)
    with using(platform):
        ours = functools.partial(conv, **arguments)
        found = derivatives(lambda x, k: ours(x, k), x[0], kernel[0]), derivatives(jax.vmap(ours), x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-4), found, expected)


@pytest.mark.parametrize(
    "size, features, chosen",
    [((28, 28), 6, (4, 4)), ((10, 10), 16, (2, 2)), ((12, 8), 16, (2, 4)), ((14, 14), 40, (1, 2)), ((7, 9), 6, None)],
)
def test_blocks_fill_the_columns_of_a_matrix_unit_and_divide_the_outputs(size, features, chosen):
    window = Correlation((1, 1), ((2, 2), (2, 2)), (1, 1), (1, 1))
    blocks = blocks_module.blocks_of(size, (5, 5), features, blocks_module.NARROW_GRADIENT, window)
    assert (blocks and blocks.size) == chosen
    if blocks:  # one block per position of the larger window, and no more features than columns
        assert blocks.correlation.output_size(size, blocks.window) == blocks.counts
        assert -(-features // 8) * 8 * blocks.size[0] * blocks.size[1] <= 128
        assert (blocks.counts[0] * blocks.size[0], blocks.counts[1] * blocks.size[1]) == size
    assert blocks_module.blocks_of(size, (5, 5), 65, blocks_module.NARROW_GRADIENT, window) is None


@pytest.mark.once
@needs_native
@pytest.mark.parametrize("features", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 7, 16, 20, 64)), 6, 33])
@pytest.mark.parametrize("channels, kernel_size, strides", [(1, 5, 1), (3, 3, 2), (17, 3, 1), (32, 1, 1)])
def test_conv_is_right_for_every_width_of_vectors(features, channels, kernel_size, strides):
    # Few features are folded, 16 fill a vector, 33 leave a rest; 12 columns fold, 5 do not; 17 channels exceed a tile.
    for width in (5, 12):
        x, kernel = normal((3, 7, width, channels)), normal((kernel_size, kernel_size, channels, features))
        pads = pad_pairs("SAME", (7, width), (kernel_size,) * 2, (strides,) * 2, (1, 1))
        reference = functools.partial(stock, strides=(strides,) * 2, resolved=pads, dilation=(1, 1))
        y, *theirs = derivatives(reference, x, kernel)
        with using("native"):
            ours = derivatives(lambda x, k: conv(x, k, strides=strides), x, kernel)
        np.testing.assert_allclose(ours[0], y, rtol=1e-4, atol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), ours[1:], tuple(theirs))


@each_implementation
def test_weight_gradients_are_the_same_bits_every_time(implementation):
    x, kernel = normal((50, 9, 9, 3)), normal((3, 3, 3, 8))
    with using(implementation):
        gradient = jax.jit(jax.grad(lambda k: jnp.sin(conv(x, k)).sum()))
        first = gradient(kernel)
        for _ in range(20):
            np.testing.assert_array_equal(gradient(kernel), first)


def test_conv_commutes_with_shifts_away_from_the_border():
    x, kernel = normal((1, 12, 12, 2)), normal((3, 3, 2, 4))
    moved = jnp.roll(x, (2, 1), axis=(1, 2))
    y, y_moved = conv(x, kernel), conv(moved, kernel)
    np.testing.assert_allclose(y_moved[:, 3:-1, 2:-1], y[:, 1:-3, 1:-2], rtol=1e-5, atol=1e-6)


@each_form
@pytest.mark.parametrize("inputs", [1, 5])
def test_bfloat16_stays_bfloat16_and_near(inputs, implementation):
    x, kernel = normal((4, 8, 8, inputs)), normal((3, 3, inputs, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(dtype):
        y, pull = jax.vjp(lambda x, k: ops.max_pool(conv(x, k), 2), x.astype(dtype), kernel.astype(dtype))
        return y, *pull(jnp.ones_like(y))

    with using(implementation):
        # 2**-6 in 2,304 terms: bfloat16 keeps 8 bits.
        for narrow, wide in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
            assert narrow.dtype == jnp.bfloat16
            assert np.abs(np.float32(narrow) - np.float32(wide)).mean() < 0.1 * np.abs(np.float32(wide)).mean()
