"""Convolution to local to full: the same function, the same gradients once tied, and back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cnnlib.errors import UserError
from cnnlib.nn.equivalence import expand, parameter_shapes, project, tied, under
from cnnlib.nn.network import network
from cnnlib.spec.notation import parse_model

PADDINGS = ("same", "valid", "1", "0+1", "2+0")


def drawn(model, shape, seed=0, dtype=jnp.float64):
    """Random parameters of a model."""
    random = np.random.RandomState(seed)
    return jax.tree.map(
        lambda like: jnp.asarray(random.normal(size=like.shape), dtype), parameter_shapes(model, shape, dtype)
    )


def output(model, parameters, x):
    return network(model, x.dtype).apply({"params": parameters}, x)


@st.composite
def nets(draw):
    """A convolutional net of up to three layers, 1-D or 2-D, with pooling, activations and a branch, and its input."""
    axes = draw(st.sampled_from([1, 2]))
    shape = (*(draw(st.integers(5, 8)) for _ in range(axes)), draw(st.integers(1, 2)))
    layers, channels = [], shape[-1]
    for _ in range(draw(st.integers(1, 3))):
        kernel = "x".join(str(draw(st.integers(1, 3))) for _ in range(axes))
        strides = "x".join(str(draw(st.integers(1, 2))) for _ in range(axes))
        padding = draw(st.sampled_from(PADDINGS))
        padding = "x".join([padding] * axes) if "+" in padding else padding
        groups = draw(st.sampled_from([n for n in (1, 2, 3) if channels % n == 0]))
        channels = features = groups * draw(st.integers(1, 3))
        options = f"d{draw(st.integers(1, 2))}:g{groups}{draw(st.sampled_from(['', ':nobias']))}"
        layers.append(f"conv:{features}@{kernel}/{strides}:{padding}:{options}")
        layers.append(draw(st.sampled_from(["relu", "tanh", "max:2", "avg:2/1", f"residual(conv:{features}@3 tanh)"])))
    model = parse_model(",".join([*layers, "dense:3"]))
    try:
        model.shapes(shape)
    except UserError:
        assume(False)
    return model, shape


@settings(max_examples=4, deadline=None)
@given(nets())
def test_the_three_nets_compute_one_function_and_have_one_gradient(net):
    model, shape = net

    @jax.jit
    def readings(parameters, x):
        """Of each reading its output, its gradient tied, and what a projection of it makes of all that."""
        found = {}
        for connectivity in ("conv", "local", "full"):
            reading = model.with_connectivity(connectivity)
            expanded = expand(model, parameters, shape, connectivity)
            gradient = jax.grad(lambda p, reading=reading: jnp.square(output(reading, p, x)).sum())(expanded)
            back = project(reading, expanded, shape, "conv")
            found[connectivity] = (
                output(reading, expanded, x),
                tied(model, gradient, shape, connectivity),
                back.total,
                output(model, back.parameters, x),
                (expanded, expand(model, back.parameters, shape, connectivity)),
            )
        return found

    jax.config.update("jax_enable_x64", True)
    try:
        x = jnp.asarray(np.random.RandomState(1).normal(size=(3, *shape)))
        found = jax.device_get(readings(drawn(model, shape), x))
    finally:
        jax.config.update("jax_enable_x64", False)
    expected, gradient, *_ = found["conv"]
    scale = np.abs(expected).max()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for connectivity in ("local", "full"):
        outputs, summed, distance, again, (expanded, twice) = found[connectivity]
        np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12 * scale)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * largest), summed, gradient)
        # And back, to the last bit wherever a weight meets the input at all.
        assert distance == 0
        np.testing.assert_allclose(again, expected, rtol=1e-12, atol=1e-12 * scale)
        if connectivity == "full":
            jax.tree.map(np.testing.assert_array_equal, twice, expanded)


@pytest.fixture
def small():
    return parse_model("conv:3@3x2/2x1:1+0x0+1 tanh dense:2"), (6, 5, 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "source, target",
    [
        ("full", "conv"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("full", "local"), ("local", "conv"))),
    ],
)
def test_a_projection_is_the_least_squares_solution(groups, source, target, float64):
    # The columns of `expand` span the smaller set: an ordinary least-squares fit onto them is the oracle.
    model, shape = parse_model(f"conv:4@3x2/2x1:1+0x0+1:g{groups} tanh dense:2"), (6, 5, 2)
    goal, reading = model.with_connectivity(target), model.with_connectivity(source)
    parameters = drawn(reading, shape, seed=3)
    projection = jax.jit(lambda values: project(reading, values, shape, target))(parameters)
    largest = "full"  # weights are compared as connections, so that taps on the padding do not count

    @functools.partial(jax.jit, static_argnums=0)
    def connections(of, values):
        return expand(of, values, shape, largest)["layer_0"]["kernel"].reshape(-1)

    leaf = np.asarray(projection.parameters["layer_0"]["kernel"])
    rest = {**drawn(goal, shape)}
    basis = []
    for index in range(leaf.size):
        unit = (np.arange(leaf.size) == index).astype(float).reshape(leaf.shape)
        basis.append(connections(goal, {**rest, "layer_0": {**rest["layer_0"], "kernel": unit}}))
    wanted = np.asarray(connections(reading, parameters))
    fit, *_ = np.linalg.lstsq(np.stack(basis, axis=1), np.asarray(wanted), rcond=None)
    np.testing.assert_allclose(leaf.reshape(-1), fit, rtol=1e-9, atol=1e-12)
    # The distance is that of kernel and biases together.
    bias, mean = parameters["layer_0"]["bias"], projection.parameters["layer_0"]["bias"]
    np.testing.assert_allclose(mean, np.asarray(bias).mean(axis=(0, 1)) if target == "conv" else bias, rtol=1e-12)
    lost = (
        np.square(np.stack(basis, axis=1) @ fit - wanted).sum() + np.square(np.asarray(bias) - np.asarray(mean)).sum()
    )
    whole = np.square(wanted).sum() + np.square(bias).sum()
    np.testing.assert_allclose(projection.distance["layer_0"], np.sqrt(lost / whole), rtol=1e-9)
    np.testing.assert_allclose(projection.total, projection.distance["layer_0"], rtol=1e-12)


def test_a_projection_in_float32_of_equal_weights_is_exact():
    # A mean of 784 equal floats, added up, would be off by some bits.
    model, shape = parse_model("conv:6@5:2 dense:3"), (28, 28, 1)
    parameters = drawn(model, shape, dtype=jnp.float32)
    expanded = jax.jit(lambda values: expand(model, values, shape, "local"))(parameters)
    back = jax.jit(lambda values: project(model.local(), values, shape, "conv"))(expanded)
    jax.tree.map(np.testing.assert_array_equal, back.parameters, parameters)
    assert float(back.total) == 0.0


def test_a_weight_that_meets_padding_only_is_projected_to_zero():
    model, shape = parse_model("conv:1@3:nobias"), (1, 1)  # one node: the outer taps never meet it
    freed = {"layer_0": {"kernel": jnp.full((1, 1), 7.0)}}
    back = jax.jit(lambda values: project(model.full(), values, shape, "conv"))(freed)
    np.testing.assert_array_equal(back.parameters["layer_0"]["kernel"].reshape(-1), [0, 7, 0])


def test_what_is_not_a_number_on_the_padding_is_left_out():
    model, shape = parse_model("conv:1@3:nobias"), (4, 1)
    kernel = jnp.ones((4, 3, 1, 1)).at[0, 0].set(jnp.nan)  # the first tap of the first position is on the padding
    back = project(model.local(), {"layer_0": {"kernel": kernel}}, shape, "conv")
    assert float(back.total) == 0
    np.testing.assert_array_equal(back.parameters["layer_0"]["kernel"].reshape(-1), [1, 1, 1])


@pytest.mark.slow
def test_maps_run_under_jit_vmap_and_differentiation(small):
    model, shape = small
    lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(drawn(model, shape, s, jnp.float32) for s in range(3)))
    expanded = jax.jit(jax.vmap(lambda p: expand(model, p, shape, "full")))(lanes)
    back = jax.vmap(lambda p: project(model.full(), p, shape, "conv"))(expanded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back.parameters, lanes)
    # Half the gradient of a squared distance to a set is the way to its nearest point.
    one = drawn(model.full(), shape, 5, jnp.float32)

    def squared(parameters):
        lost = project(model.full(), parameters, shape, "conv")
        entry = parameters["layer_0"]
        return lost.total**2 * sum(jnp.square(leaf).sum() for leaf in entry.values())

    nearest = expand(model, project(model.full(), one, shape, "conv").parameters, shape, "full")
    way = jax.tree.map(lambda a, b: a - b, one["layer_0"], nearest["layer_0"])
    found = jax.grad(squared)(one)["layer_0"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 2, b, rtol=1e-3, atol=1e-4), found, way)


def test_what_is_under_a_window_is_said_place_by_place():
    (layer,) = parse_model("conv:1@2x2:0+1x0+1").layers
    # Positions and taps of a map of 2 rows and 3 columns, row by row.
    expected = [[0, 1, 3, 4], [1, 2, 4, 5], [2, -1, 5, -1], [3, 4, -1, -1], [4, 5, -1, -1], [5, -1, -1, -1]]
    assert under(layer.window((2, 3, 1))).tolist() == expected


def test_the_wrong_direction_or_tree_is_a_user_error(small):
    model, shape = small
    parameters = drawn(model, shape, dtype=jnp.float32)
    with pytest.raises(UserError, match="no special case of a conv layer in this direction; project goes there"):
        expand(model.full(), parameters, shape, "conv")
    with pytest.raises(UserError, match="expand goes there"):
        project(model, parameters, shape, "full")
    with pytest.raises(UserError, match=r"layer_0: full:3.* has a kernel of shape \(60, 45\), not"):
        project(model.full(), parameters, shape, "conv")
