"""The operations against loops in NumPy, against lax, and against finite differences, over random shapes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from problems import (
    derivatives,
    each_form,
    each_form_in_time,
    each_implementation,
    implementations,
    needs_native,
    normal,
    problems,
    using,
)

from cnnlib import kernels, lowerings, ops, primitives
from cnnlib.errors import UserError
from cnnlib.geometry import Correlation
from cnnlib.spec import Conv, MaxPool, pad_pairs

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
    blocks = lowerings.blocks_of(size, (5, 5), features, lowerings.NARROW_GRADIENT, window)
    assert (blocks and blocks.size) == chosen
    if blocks:  # one block per position of the larger window, and no more features than columns
        assert blocks.correlation.output_size(size, blocks.window) == blocks.counts
        assert -(-features // 8) * 8 * blocks.size[0] * blocks.size[1] <= 128
        assert (blocks.counts[0] * blocks.size[0], blocks.counts[1] * blocks.size[1]) == size
    assert lowerings.blocks_of(size, (5, 5), 65, lowerings.NARROW_GRADIENT, window) is None


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
        patch.setattr(lowerings, "pools_within", lambda *_: True)
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
    assert lowerings.scatters(gradient, kernel, size, correlation) == chosen


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


# What peers' own test suites found, or take.


SPELLINGS = [
    ({"padding": [(1, 1), (0, 2)], "strides": [2, 1]}, {"padding": ((1, 1), (0, 2)), "strides": (2, 1)}),
    ({"padding": [[1, 1], [0, 2]]}, {"padding": ((1, 1), (0, 2))}),
    ({"padding": np.array([[1, 1], [0, 2]])}, {"padding": ((1, 1), (0, 2))}),
    ({"padding": (1, 0)}, {"padding": ((1, 1), (0, 0))}),
    ({"padding": np.int64(1), "strides": np.int32(2)}, {"padding": 1, "strides": 2}),
    ({"padding": "same", "dilation": np.array([1, 2])}, {"padding": "SAME", "dilation": (1, 2)}),
    ({"padding": "valid"}, {"padding": "VALID"}),
]


@pytest.mark.parametrize(("given_as", "meant"), SPELLINGS)
def test_arguments_may_be_spelled_as_elsewhere(given_as, meant):
    x, kernel = normal((2, 6, 7, 3)), normal((2, 2, 3, 4))
    np.testing.assert_array_equal(ops.conv2d(x, kernel, **given_as), ops.conv2d(x, kernel, **meant))
    spec, same = Conv(4, [2, 2], **given_as), Conv(4, (2, 2), **meant)
    assert spec == same and hash(spec) == hash(same) and str(spec) == str(same)
    if "dilation" not in meant:
        pooled = [ops.max_pool(x, [2, 3], **arguments) for arguments in (given_as, meant)]
        np.testing.assert_array_equal(*pooled)
        assert MaxPool([2, 3], **given_as) == MaxPool((2, 3), **meant)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": None},
        {"padding": True},
        {"padding": 1.0},
        {"padding": [(1, 1, 1), (0, 0, 0)]},
        {"padding": [(1, 1)]},
        {"padding": "causal"},
        {"padding": ("SAME", "VALID")},
        {"strides": None},
        {"strides": True},
        {"strides": 2.0},
        {"strides": "2"},
        {"strides": (1, 2, 3)},
        {"strides": np.array([1.0, 2.0])},
        {"dilation": (True, 1)},
        {"strides": np.True_},
    ],
)
def test_arguments_that_mean_nothing_are_user_errors(arguments, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it sees such things first, but in tests only
    ((name, value),) = arguments.items()
    with pytest.raises(UserError, match=name.removesuffix("s")):
        ops.conv2d(normal((2, 6, 7, 3)), normal((2, 2, 3, 4)), **arguments)
    with pytest.raises(UserError, match=name.removesuffix("s")):
        Conv(4, 2, **arguments).output_shape((6, 7, 3))
    if name != "dilation" and value is not None:
        with pytest.raises(UserError, match=name.removesuffix("s")):
            ops.max_pool(normal((2, 6, 7, 3)), 2, **arguments)


def test_features_are_one_number():
    for features in (True, (3, 4), 3.0, None):
        with pytest.raises(UserError, match="features must be"):
            Conv(features, 3)


@each_form
def test_operations_run_one_by_one_where_jit_is_off(implementation):
    x, kernel = normal((2, 6, 6, 2)), normal((3, 3, 2, 4))

    def value(x, kernel):
        return ops.max_pool(conv(x, kernel), 2).sum()

    with using(implementation):
        expected = jax.grad(value, (0, 1))(x, kernel)
        with jax.disable_jit():
            found = jax.grad(value, (0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@each_form_in_time
def test_a_population_of_nobody_has_the_shapes_of_any_other(implementation):
    x, kernel, local = normal((2, 6, 6, 2)), normal((3, 3, 2, 4)), normal((6, 6, 3, 3, 2, 4))
    nobody = lambda one: jnp.zeros((0, *one.shape))  # noqa: E731
    with using(implementation):
        for operation, weights in ((ops.conv2d, kernel), (ops.local2d, local)):
            gradient = jax.grad(lambda *two, operation=operation: operation(*two).sum(), (0, 1))
            for axes in ((0, 0), (0, None), (None, 0)):
                two = [one if axis is None else nobody(one) for one, axis in zip((x, weights), axes, strict=True)]
                assert jax.vmap(operation, axes)(*two).shape == (0, 2, 6, 6, 4)
                shapes = [one.shape for one in jax.vmap(gradient, axes)(*two)]
                assert shapes == [(0, *x.shape), (0, *weights.shape)]
        assert jax.vmap(lambda x: ops.max_pool(x, 2))(nobody(x)).shape == (0, 2, 3, 3, 2)


@each_form
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_no_type_is_promoted_unasked(implementation, dtype, float64):
    x, kernel, local, channel = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 6, 6, 2), (3, 3, 2, 4), (6, 6, 3, 3, 2, 4), (2,))
    )
    operations = (
        (ops.conv2d, (x, kernel)),
        (ops.local2d, (x, local)),
        (lambda x: ops.max_pool(x, 2), (x,)),
        (lambda x: ops.max_pool(x, 3, 1), (x,)),
        (lambda x: ops.avg_pool(x, 2), (x,)),
        (lambda x, scale: ops.batch_norm(x, scale, scale, 1e-5)[0], (x, channel)),
    )
    with using(implementation), jax.numpy_dtype_promotion("strict"):
        for operation, operands in operations:

            def with_gradients(*operands, operation=operation):
                y, back = jax.vjp(operation, *operands)
                return (y, *back(y))

            # Operations are written out when they are lowered. Not compiled: for SSE4 this LLVM has no float16.
            lowered = jax.jit(with_gradients).lower(*operands)
            assert [one.dtype for one in lowered.out_info] == [dtype] * (1 + len(operands))


@each_implementation
def test_a_mistake_is_a_user_error_before_a_kernel_sees_it(implementation, monkeypatch):
    x, kernel = jnp.ones((1, 4, 4, 3)), jnp.ones((2, 2, 3, 4))
    wrong = [
        (lambda: conv(jnp.ones((1, 4, 4, 1)), jnp.ones((5, 5, 1, 1)), padding="VALID"), "spans 5"),
        (lambda: ops.max_pool(x, 5), "spans 5"),
        (lambda: conv(x, jnp.ones((2, 2, 2, 4))), "conv2d: x has 3 channels, its kernel takes 2"),
        (lambda: conv(x[0], jnp.ones((2, 2, 4))), "conv1d: x has 3 channels, its kernel takes 2"),
        (lambda: conv(x, kernel[0]), r"conv2d: kernel must be \(kernel_height, kernel_width, channel, feature\)"),
        (lambda: ops.conv2d(x[0], kernel), r"conv2d: x must be \(batch, height, width, channel\), its shape is"),
        (lambda: conv(x, kernel.astype(jnp.bfloat16)), "x is float32, its kernel bfloat16"),
        (lambda: conv(x.astype(int), kernel.astype(int)), "expected one floating-point type"),
        (lambda: conv(x, kernel, padding="FULL"), "padding must be SAME, VALID"),
        (lambda: conv(x, kernel, strides=0), "strides must be in 1"),
        (lambda: conv(x, kernel, dilation=(1, 0)), "dilation must be in 1"),
        (lambda: conv(x, kernel[:0]), "kernel must be in 1"),
        (lambda: ops.max_pool(x.astype(int), 2), "of a floating-point type, it is int32"),
        (lambda: ops.max_pool(x[None], 2), r"of shape \(1, 1, 4, 4, 3\)"),
        (lambda: ops.avg_pool(x, 2, strides=0), "strides must be in 1"),
    ]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it sees such things first, but in tests only
    with using(implementation):
        for act, message in wrong:
            with pytest.raises(UserError, match=message):
                act()
        # Below the public operations, too, nothing reaches a kernel that it would read past.
        correlation = Correlation((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1))
        with pytest.raises(TypeError, match="differ in lanes or channels"):
            primitives.correlate(x[None], jnp.ones((1, 2, 2, 2, 4)), correlation)
