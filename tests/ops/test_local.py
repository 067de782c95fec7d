"""Local layers against loops in NumPy, against lax, and against finite differences, over random shapes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from problems import derivatives, each_form, each_implementation, implementations, needs_native, normal, problems, using

from cnnlib import ops
from cnnlib.errors import UserError
from cnnlib.ops import primitives
from cnnlib.ops.geometry import Correlation

draws = settings(max_examples=6, deadline=None)
few_draws = settings(max_examples=2, deadline=None)  # each compiles several programs


def local(x, kernel, **arguments):
    return {3: ops.local1d, 4: ops.local2d}[x.ndim](x, kernel, **arguments)


@st.composite
def local_problems(draw):
    """As `problems`, with a kernel for every position, and batches on both sides of what kernels.cc takes."""
    (_, *size, inputs), (*window, _, outputs), arguments, resolved = draw(problems())
    positions = [
        (n + low + high - ((k - 1) * d + 1)) // s + 1
        for n, k, s, d, (low, high) in zip(
            size, window, arguments["strides"], arguments["dilation"], resolved, strict=True
        )
    ]
    batch = draw(st.sampled_from([1, 8, 17]))
    return (batch, *size, inputs), (*positions, *window, inputs, outputs), arguments, resolved


def looped(x, kernel, strides, resolved, dilation):
    """A local layer as its definition says it: at each position the sum over taps and channels, by its own weights."""
    x = np.pad(x, [(0, 0), *resolved, (0, 0)])
    axes = len(strides)
    y = np.zeros((x.shape[0], *kernel.shape[:axes], kernel.shape[-1]))
    for place in itertools.product(*map(range, kernel.shape[:axes])):
        for tap in itertools.product(*map(range, kernel.shape[axes : 2 * axes])):
            at = tuple(p * s + t * d for p, s, t, d in zip(place, strides, tap, dilation, strict=True))
            y[(slice(None), *place)] += x[(slice(None), *at)] @ kernel[(*place, *tap)]
    return y


def stock(x, kernel, strides, resolved, dilation):
    axes = len(strides)
    # JAX wants channels and taps in one axis, channels first.
    window = kernel.shape[axes : 2 * axes]
    flat = jnp.moveaxis(kernel, -2, axes).reshape(*kernel.shape[:axes], -1, kernel.shape[-1])
    dimensions = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}[x.ndim]
    return lax.conv_general_dilated_local(
        x, flat, strides, resolved, window, rhs_dilation=dilation, dimension_numbers=dimensions
    )


@draws
@given(local_problems(), implementations)
def test_local_equals_its_definition(problem, implementation):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)
    with using(implementation):
        y = jax.jit(lambda x, k: local(x, k, **arguments))(x, kernel)
    expected = looped(np.asarray(x), np.asarray(kernel), arguments["strides"], resolved, arguments["dilation"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@draws
@given(local_problems(), implementations)
def test_local_has_the_derivatives_of_the_stock_operation(problem, implementation):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)

    with using(implementation):
        ours = derivatives(lambda x, k: local(x, k, **arguments), x, kernel)
    theirs = derivatives(lambda x, k: stock(x, k, arguments["strides"], resolved, arguments["dilation"]), x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), ours, theirs)


@pytest.mark.slow
@few_draws
@given(local_problems(), implementations)
def test_local_has_the_second_derivatives_of_the_stock_operation(problem, implementation):
    x_shape, kernel_shape, arguments, resolved = problem
    x, kernel = normal(x_shape), normal(kernel_shape)
    directions = normal(x_shape, seed=2), normal(kernel_shape, seed=3)

    def products(operation):
        gradient = jax.grad(lambda x, k: jnp.sin(operation(x, k)).sum(), (0, 1))
        _, pull = jax.vjp(gradient, x, kernel)
        return jax.jvp(gradient, (x, kernel), directions)[1], pull(directions)

    with using(implementation):
        ours = products(lambda x, k: local(x, k, **arguments))
    theirs, _ = products(lambda x, k: stock(x, k, arguments["strides"], resolved, arguments["dilation"]))
    for product in ours:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-3), product, theirs)


def test_local_gradients_are_finite_differences_in_float64(float64):
    random = np.random.RandomState(0)
    x, kernel = jnp.asarray(random.normal(size=(2, 7, 6, 2))), jnp.asarray(random.normal(size=(3, 5, 3, 2, 2, 3)))

    @jax.jit
    def value(x, kernel):
        return jnp.sin(local(x, kernel, strides=(2, 1), padding=((1, 2), (0, 0)), dilation=(2, 1))).sum()

    for which, gradient in enumerate(jax.jit(jax.grad(value, (0, 1)))(x, kernel)):
        direction = random.normal(size=gradient.shape)
        above, below = ([np.asarray(x), np.asarray(kernel)] for _ in range(2))
        above[which], below[which] = above[which] + 1e-5 * direction, below[which] - 1e-5 * direction
        difference = (value(*above) - value(*below)) / 2e-5
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), difference, rtol=1e-7)


@pytest.mark.slow
@few_draws
@given(local_problems(), implementations)
def test_local_is_the_same_under_every_transformation(problem, implementation):
    x_shape, kernel_shape, arguments, _ = problem
    xs, kernels = normal((2, *x_shape)), normal((2, *kernel_shape))

    def value_and_gradients(x, kernel):
        y, pull = jax.vjp(lambda x, k: local(x, k, **arguments), x, kernel)
        return y, pull(jnp.cos(y))

    with using(implementation):
        alone = [[value_and_gradients(x, kernel) for kernel in kernels] for x in xs]
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(alone[i][i] for i in range(2)))
        over_both = jax.vmap(value_and_gradients)(xs, kernels)
        mapped = jax.jit(lambda pair: lax.map(lambda p: value_and_gradients(*p), pair))((xs, kernels))
        rematerialised = jax.vmap(jax.checkpoint(value_and_gradients))(xs, kernels)
        over_weights = jax.vmap(value_and_gradients, (None, 0))(xs[0], kernels)
        over_inputs = jax.vmap(value_and_gradients, (0, None))(xs, kernels[1])

    def agree(result, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), result, expected)

    for result in (over_both, mapped, rematerialised):
        agree(result, expected)
    for i in range(2):
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], over_weights), alone[0][i])
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], over_inputs), alone[i][1])


@pytest.mark.once
@needs_native
@pytest.mark.parametrize("batch, channels, features", [(8, 1, 6), (9, 3, 7), (15, 6, 16), (64, 5, 13), (81, 17, 1)])
def test_local_is_right_for_every_width_of_vectors(batch, channels, features):
    # 16 images fill a vector and 64 a tile; 6 sums fill a tile of features, 4 rows one of the weights' gradient.
    x, kernel = normal((batch, 5, 7, channels)), normal((3, 4, 3, 3, channels, features))
    expected, *theirs = derivatives(lambda x, k: stock(x, k, (2, 2), ((1, 1), (1, 1)), (1, 1)), x, kernel)
    with using("native"):
        y, *ours = derivatives(lambda x, k: local(x, k, strides=2, padding=1), x, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), ours, theirs)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_forms_of_accelerators_are_right_alone_and_with_other_lanes(platform):
    x, kernel = normal((3, 4, 6, 7, 2)), normal((3, 3, 4, 3, 2, 2, 5))
    reference = lambda x, k: stock(x, k, (2, 2), ((1, 1), (1, 0)), (1, 1))  # noqa: E731
    ours = lambda x, k: local(x, k, strides=2, padding=((1, 1), (1, 0)))  # noqa: E731
    expected = derivatives(reference, x[0], kernel[0]), derivatives(jax.vmap(reference), x, kernel)
    with using(platform):
        found = derivatives(ours, x[0], kernel[0]), derivatives(jax.vmap(ours), x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-4), found, expected)


@each_form
def test_a_local_layer_with_equal_weights_is_a_convolution(implementation):
    x, kernel = normal((9, 6, 5, 2)), normal((3, 3, 2, 4))
    with using(implementation):
        tied = jnp.broadcast_to(kernel, (6, 5, *kernel.shape))
        np.testing.assert_allclose(local(x, tied), ops.conv2d(x, kernel), rtol=1e-5, atol=1e-5)


@each_implementation
def test_local_gradients_are_the_same_bits_every_time(implementation):
    x, kernel = normal((50, 9, 9, 3)), normal((9, 9, 3, 3, 3, 8))
    with using(implementation):
        gradient = jax.jit(jax.grad(lambda x, k: jnp.sin(local(x, k)).sum(), (0, 1)))
        first = gradient(x, kernel)
        for _ in range(10):
            jax.tree.map(np.testing.assert_array_equal, gradient(x, kernel), first)


@each_form
def test_bfloat16_stays_bfloat16_and_near(implementation):
    x, kernel = normal((9, 8, 8, 3)), normal((8, 8, 3, 3, 3, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(dtype):
        y, pull = jax.vjp(local, x.astype(dtype), kernel.astype(dtype))
        return y, *pull(jnp.ones_like(y))

    with using(implementation):
        for narrow, wide in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
            assert narrow.dtype == jnp.bfloat16
            assert np.abs(np.float32(narrow) - np.float32(wide)).mean() < 0.1 * np.abs(np.float32(wide)).mean()


@each_implementation
def test_no_weight_is_copied_for_an_example(implementation):
    # 128 copies of 14x14 banks of 5x5x8x8 would be 1.3 GB; the windows of the values are 20 MB.
    x, kernel = normal((128, 14, 14, 8)), normal((14, 14, 5, 5, 8, 8))
    with using(implementation):
        step = jax.jit(jax.value_and_grad(lambda k, x: jnp.square(local(x, k)).sum(), (0, 1)))
        needed = step.lower(kernel, x).compile().memory_analysis().temp_size_in_bytes
    assert needed < 10 * kernel.nbytes + 100 * x.nbytes < 128 * kernel.nbytes


@each_form
def test_a_batch_of_nothing_has_a_gradient_of_zero(implementation):
    kernel = normal((5, 5, 3, 3, 2, 4))
    with using(implementation):
        gradient = jax.grad(lambda k: local(jnp.zeros((0, 5, 5, 2)), k).sum())(kernel)
        np.testing.assert_array_equal(gradient, jnp.zeros_like(kernel))


@each_implementation
def test_a_mistake_is_a_user_error_before_a_kernel_sees_it(implementation, monkeypatch):
    x, kernel = jnp.ones((8, 4, 4, 3)), jnp.ones((4, 4, 2, 2, 3, 4))
    wrong = [
        (lambda: local(x, kernel[:3]), "the kernel has weights for 3x4 positions, its window has 4x4"),
        (lambda: local(x, kernel, strides=2), "weights for 4x4 positions, its window has 2x2"),
        (lambda: local(x[..., :2], kernel), "local2d: x has 2 channels, its kernel takes 3"),
        (lambda: local(x, kernel[0]), r"local2d: kernel must be \(output_height, output_width, kernel_height"),
        (lambda: local(x, kernel.astype(jnp.bfloat16)), "x is float32, its kernel bfloat16"),
        (lambda: local(x, kernel, padding="FULL"), "padding must be SAME, VALID"),
    ]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it sees such things first, but in tests only
    with using(implementation):
        for act, message in wrong:
            with pytest.raises(UserError, match=message):
                act()
        # Below the public operations, too, nothing reaches a kernel that it would read past.
        correlation = Correlation((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1))
        with pytest.raises(TypeError, match="differ in lanes, positions or channels"):
            primitives.local(x[None], kernel[None], correlation)


def test_lanes_have_gradients_in_bfloat16():
    """With JAX 0.7.2 a map over lanes could not be transposed: nets of local layers did not train in bfloat16."""
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 3, 6, 6, 2), (2, 4, 4, 3, 3, 2, 5)))
    loss = lambda x, kernel: ops.local2d(x, kernel, padding="VALID").sum()  # noqa: E731
    back_x, back_kernel = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(x, kernel)
    assert back_x.shape == x.shape and back_kernel.shape == kernel.shape
    # Each weight meets one value, 1, of each of 3 images; the corner of an image meets one weight of each feature.
    assert (back_kernel == 3).all() and (back_x[:, :, 0, 0] == 5).all()
