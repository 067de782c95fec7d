"""Grouped, depthwise and transposed convolution against loops in NumPy, in float64; counts by connections."""

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
from problems import each_form, implementations, normal, problems, using

from cnnlib import ops
from cnnlib.errors import UserError
from cnnlib.nn.equivalence import expand, parameter_shapes
from cnnlib.spec.budget import match
from cnnlib.spec.counts import count
from cnnlib.spec.layers import Conv
from cnnlib.spec.notation import parse_model

few = settings(max_examples=8, deadline=None)


@st.composite
def grouped_problems(draw):
    """Shapes of x and kernel, groups, and the arguments of a convolution that fits; paddings also as pairs."""
    x_shape, kernel_shape, arguments, resolved = draw(problems())
    groups, channels, features = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    shapes = (*x_shape[:-1], groups * channels), (*kernel_shape[:-2], channels, groups * features)
    return *shapes, groups, arguments, resolved


class Loops:
    """A grouped convolution and its transposes as the definitions say, in float64."""

    def __init__(self, size, kernel_shape, groups, arguments, resolved):
        self.groups, self.resolved, self.size = groups, resolved, size
        self.strides, self.dilation, self.window = arguments["strides"], arguments["dilation"], kernel_shape[:-2]
        self.places = tuple(
            (n + sum(pads) - (k - 1) * d - 1) // s + 1
            for n, pads, k, d, s in zip(size, resolved, self.window, self.dilation, self.strides, strict=True)
        )
        self.kernel_shape = kernel_shape

    def each(self):
        """Each group's channels and features, with each place, tap, and value under it."""
        channels, features = self.kernel_shape[-2], self.kernel_shape[-1] // self.groups
        for g in range(self.groups):
            own = slice(g * channels, (g + 1) * channels), slice(g * features, (g + 1) * features)
            for place in itertools.product(*map(range, self.places)):
                for tap in itertools.product(*map(range, self.window)):
                    at = tuple(
                        p * s + t * d for p, s, t, d in zip(place, self.strides, tap, self.dilation, strict=True)
                    )
                    yield (slice(None), *place), tap, (slice(None), *at), *own

    def forward(self, x, kernel):
        x = np.pad(x.astype(float), [(0, 0), *self.resolved, (0, 0)])
        y = np.zeros((len(x), *self.places, kernel.shape[-1]))
        for place, tap, at, channels, features in self.each():
            y[(*place, features)] += x[(*at, channels)] @ kernel[(*tap, slice(None), features)].astype(float)
        return y

    def to_x(self, y, kernel):
        padded = [n + sum(pads) for n, pads in zip(self.size, self.resolved, strict=True)]
        x = np.zeros((len(y), *padded, kernel.shape[-2] * self.groups))
        for place, tap, at, channels, features in self.each():
            bank = kernel[(*tap, slice(None), features)].astype(float)
            x[(*at, channels)] += y[(*place, features)].astype(float) @ bank.T
        inside = (slice(low, low + n) for n, (low, _) in zip(self.size, self.resolved, strict=True))
        return x[(slice(None), *inside)]

    def to_kernel(self, x, y):
        x = np.pad(x.astype(float), [(0, 0), *self.resolved, (0, 0)])
        kernel = np.zeros(self.kernel_shape)
        for place, tap, at, channels, features in self.each():
            kernel[(*tap, slice(None), features)] += x[(*at, channels)].T @ y[(*place, features)].astype(float)
        return kernel


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(operation, first, second, cotangent):
    y, back = jax.vjp(operation, first, second)
    return (y, *back(cotangent))


@few
@given(grouped_problems(), implementations)
def test_grouped_convolution_and_its_gradients_are_their_definitions(problem, implementation):
    x_shape, kernel_shape, groups, arguments, resolved = problem
    loops = Loops(x_shape[1:-1], kernel_shape, groups, arguments, resolved)
    x, kernel = normal(x_shape), normal(kernel_shape)
    gradient = normal((x_shape[0], *loops.places, kernel_shape[-1]), seed=1)
    conv = {3: ops.conv1d, 4: ops.conv2d}[x.ndim]
    with using(implementation):
        found = with_gradients(lambda x, k: conv(x, k, **arguments, feature_group_count=groups), x, kernel, gradient)
    x, kernel, gradient = map(np.asarray, (x, kernel, gradient))
    assert_close(found, (loops.forward(x, kernel), loops.to_x(gradient, kernel), loops.to_kernel(x, gradient)))


@few
@given(grouped_problems(), implementations)
def test_transposed_convolution_and_its_gradients_are_their_definitions(problem, implementation):
    x_shape, kernel_shape, groups, arguments, resolved = problem
    loops = Loops(x_shape[1:-1], kernel_shape, groups, arguments, resolved)
    y, kernel = normal((x_shape[0], *loops.places, kernel_shape[-1])), normal(kernel_shape)
    direction = normal(x_shape, seed=1)
    back = {3: ops.conv_transpose1d, 4: ops.conv_transpose2d}[y.ndim]
    arguments = {**arguments, "output_size": x_shape[1:-1], "feature_group_count": groups}
    with using(implementation):
        found = with_gradients(lambda y, k: back(y, k, **arguments), y, kernel, direction)
    y, kernel, direction = map(np.asarray, (y, kernel, direction))
    assert_close(found, (loops.to_x(y, kernel), loops.forward(direction, kernel), loops.to_kernel(direction, y)))


@few
@given(grouped_problems(), implementations)
def test_a_grouped_local_layer_of_equal_kernels_is_the_convolution(problem, implementation):
    x_shape, kernel_shape, groups, arguments, resolved = problem
    loops = Loops(x_shape[1:-1], kernel_shape, groups, arguments, resolved)
    x, kernel = normal(x_shape), normal(kernel_shape)
    gradient = normal((x_shape[0], *loops.places, kernel_shape[-1]), seed=1)
    local = {3: ops.local1d, 4: ops.local2d}[x.ndim]

    def repeated(x, kernel):
        banks = jnp.broadcast_to(kernel, (*loops.places, *kernel.shape))
        return local(x, banks, **arguments, feature_group_count=groups)

    with using(implementation):
        found = with_gradients(repeated, x, kernel, gradient)
    x, kernel, gradient = map(np.asarray, (x, kernel, gradient))
    assert_close(found, (loops.forward(x, kernel), loops.to_x(gradient, kernel), loops.to_kernel(x, gradient)))


@each_form
@pytest.mark.parametrize("transposed", [False, True])
def test_under_vmap_each_is_as_alone(transposed, implementation):
    groups, strides = 2, (2, 1)
    operation = ops.conv_transpose2d if transposed else ops.conv2d
    shape = (3, 4, 5, 6) if transposed else (3, 4, 5, 4)
    x, kernel = normal((2, *shape)), normal((2, 3, 2, 2, 6))
    one = jax.jit(lambda x, k: operation(x, k, strides=strides, feature_group_count=groups))
    with using(implementation):
        for axes in ((0, 0), (0, None), (None, 0)):
            operands = [many if axis == 0 else many[0] for many, axis in zip((x, kernel), axes, strict=True)]
            found = jax.jit(jax.vmap(one, axes))(*operands)
            for n in range(2):
                alone = [operand[n] if axis == 0 else operand for operand, axis in zip(operands, axes, strict=True)]
                np.testing.assert_allclose(found[n], one(*alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "size"), [("SAME", (8, 15)), ("VALID", (9, 14)), (1, (7, 12)), (((0, 1), (2, 0)), (8, 12))]
)
def test_a_transposed_convolution_has_the_size_that_it_came_from(padding, size):
    # (4 - 1) 2 + 3 = 9 and (5 - 1) 3 + 2 = 14 before padding is cropped; as PyTorch has it (ConvTranspose2d).
    y, kernel = normal((1, 4, 5, 2)), normal((3, 2, 1, 2))
    x = ops.conv_transpose2d(y, kernel, strides=(2, 3), padding=padding)
    assert x.shape == (1, *size, 1)
    assert ops.conv2d(x, kernel, strides=(2, 3), padding=padding).shape == y.shape


def test_the_mean_of_a_window_may_leave_out_its_padding():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    found = ops.avg_pool(x, 2, padding=1, count_include_pad=False)[0, :, :, 0]
    np.testing.assert_allclose(found, [[0.0, 1.5], [4.5, 6.0]])  # (0), (1, 2), (3, 6), (4, 5, 7, 8)
    assert ops.avg_pool(x, 2, padding=1)[0, 0, 0, 0] == 0 and ops.avg_pool(x, 2, padding=1)[0, 0, 1, 0] == 0.75


def test_mistakes_in_groups_are_user_errors(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it sees such things first, but in tests only
    x, kernel = normal((1, 4, 4, 6)), normal((3, 3, 2, 6))
    wrong = [
        (lambda: ops.conv2d(x, kernel, feature_group_count=2), r"6 channels, its kernel takes 4 \(2 groups of 2\)"),
        (lambda: ops.conv2d(x, kernel[..., :5], feature_group_count=3), "5 features do not divide into 3 groups"),
        (lambda: ops.conv2d(x, kernel, feature_group_count=0), "feature_group_count must be in 1"),
        (lambda: ops.conv2d(x, kernel, feature_group_count=(3, 1)), "feature_group_count must be one whole number"),
        (lambda: ops.conv_transpose2d(x, kernel[..., :5]), "y has 6 features, its kernel 5"),
        (lambda: ops.conv_transpose2d(x, kernel, output_size=(9, 4)), "takes 9x4 to 9x4, and y has 4x4"),
        (lambda: ops.conv_transpose2d(x, kernel, padding=3), "nothing is left of a result of 0x0"),
        (lambda: ops.conv_transpose2d(x, kernel, output_size=(4, 4, 4)), "output_size 4x4x4 has 3 axes"),
    ]
    for act, message in wrong:
        with pytest.raises(UserError, match=message):
            act()


def separable(channels, features, strides):
    """A depthwise convolution and one of 1x1, each with a norm (Howard et al., "MobileNets", 2017, figure 3)."""
    return f"conv:{channels}@3/{strides}:g{channels}:nobias norm relu conv:{features}@1:nobias norm relu"


def test_mobilenet_has_its_published_counts():
    # Table 1 of the paper. Keras states 4,231,976 trainable parameters; table 4 of the paper 4.2 million, and 569
    # million multiply-adds.
    pairs = [(32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), *5 * [(512, 512)]]
    blocks = [separable(*pair, 2 if pair in ((64, 128), (128, 256), (256, 512)) else 1) for pair in pairs]
    blocks += [separable(512, 1024, 2), separable(1024, 1024, 1)]
    found = count(parse_model(" ".join(["conv:32@3/2:nobias norm relu", *blocks, "avg:7 dense:1000"])), (224, 224, 3))
    assert (found.parameters, round(found.macs / 1e6)) == (4_231_976, 569)


@pytest.mark.parametrize(("connectivity", "banks"), [("conv", 1), ("local", 12)])
def test_a_group_has_edges_within_itself_only(connectivity, banks):
    # 12 places, 4 taps, 3 groups of 2 channels and 3 features.
    model = parse_model("conv:9@2x2:valid:g3").with_connectivity(connectivity)
    found = count(model, (4, 5, 6))
    assert (found.weights, found.biases, found.connections) == (banks * 4 * 3 * 2 * 3, banks * 9, 12 * 4 * 3 * 2 * 3)
    ones = jax.tree.map(lambda like: jnp.ones(like.shape), parameter_shapes(model, (4, 5, 6)))
    full = expand(model, ones, (4, 5, 6), "full")["layer_0"]["kernel"]
    assert (full == 1).sum() == found.connections and (full == 0).sum() == full.size - found.connections


def test_groups_that_do_not_divide_are_user_errors():
    for wrong in (lambda: Conv(4, 3, groups=3), lambda: parse_model("conv:4@3:g2").shapes((5, 5, 3))):
        with pytest.raises(UserError, match=r"do not divide into [23] groups"):
            wrong()
    with pytest.raises(UserError, match="widths of conv:4@3:g2 dense:10 cannot change"):
        match(parse_model("conv:4@3:g2 dense:10"), 1000, "parameters", (5, 5, 2))
