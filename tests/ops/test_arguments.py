"""Operations take arguments as their peers do, and refuse in one line what means nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from problems import (
    conv,
    each_form,
    each_form_in_time,
    each_implementation,
    normal,
    using,
)

from cnnlib import ops
from cnnlib.errors import UserError
from cnnlib.ops import primitives
from cnnlib.ops.geometry import Correlation
from cnnlib.spec.layers import Conv, MaxPool

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
