from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import each_implementation, using

from cnnlib.nn.network import initial, logits, network, stretches, training_logits
from cnnlib.spec.architectures import ARCHITECTURES, lenet5, mlp
from cnnlib.spec.notation import parse_model


def initialised(model, shape, seed=0):
    net = network(model)
    return net, jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, *shape)))["params"]


def test_a_full_net_is_products_biases_and_relus():
    net, parameters = initialised(mlp(7, 5).with_num_classes(3), (4, 2))
    parameters = jax.tree.map(lambda p: p + 0.1, parameters)
    x = np.random.RandomState(0).normal(size=(6, 4, 2)).astype("float32")
    layers = jax.tree.map(np.asarray, parameters)
    h = x.reshape(6, 8)
    for name in ("layer_0", "layer_2"):
        h = np.maximum(h @ layers[name]["kernel"] + layers[name]["bias"], 0)
    expected = h @ layers["layer_4"]["kernel"] + layers["layer_4"]["bias"]
    np.testing.assert_allclose(logits(net, parameters, {}, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_residual_adds_its_input():
    net, parameters = initialised(parse_model("residual(dense:4 tanh)"), (4,))
    x = np.random.RandomState(0).normal(size=(3, 4)).astype("float32")
    inner = jax.tree.map(np.asarray, parameters["layer_0"]["layer_0"])
    expected = x + np.tanh(x @ inner["kernel"] + inner["bias"])
    np.testing.assert_allclose(net.apply({"params": parameters}, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_residual_adds_its_shortcut():
    net, parameters = initialised(parse_model("residual(dense:4 tanh|dense:4)"), (3,))
    assert sorted(parameters) == ["layer_0", "layer_0_shortcut"]
    x = np.random.RandomState(0).normal(size=(5, 3)).astype("float32")
    branch, shortcut = (np.asarray(parameters[name]["layer_0"]["kernel"]) for name in sorted(parameters))
    expected = x @ shortcut + np.tanh(x @ branch)
    np.testing.assert_allclose(net.apply({"params": parameters}, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_full_reading_joins_all_nodes_and_keeps_the_map():
    net, parameters = initialised(parse_model("full:2@3/2 max:2"), (8, 4, 3))
    kernel, bias = (np.asarray(parameters["layer_0"][name]) + 0.1 for name in ("kernel", "bias"))
    assert kernel.shape == (96, 16) and bias.shape == (4, 2, 2)
    x = np.random.RandomState(0).normal(size=(5, 8, 4, 3)).astype("float32")
    maps = (x.reshape(5, 96) @ kernel).reshape(5, 4, 2, 2) + bias
    expected = maps.reshape(5, 2, 2, 1, 2, 2).max(axis=(2, 4))
    y = net.apply({"params": {"layer_0": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}, jnp.asarray(x))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_every_position_of_a_local_layer_starts_with_a_kernel_of_its_own():
    _, parameters = initialised(parse_model("local:8@3x5"), (9, 10, 4))
    kernel, bias = parameters["layer_0"]["kernel"], parameters["layer_0"]["bias"]
    assert kernel.shape == (9, 10, 3, 5, 4, 8) and bias.shape == (9, 10, 8) and not np.any(bias)
    # Variance 1 / fan-in, which is that of a window.
    assert abs(np.asarray(kernel).var() * 60 - 1) < 0.1
    assert not np.array_equal(kernel[0, 0], kernel[0, 1])


def test_a_layer_without_bias_has_none():
    _, parameters = initialised(parse_model("conv:2@3:nobias dense:3:nobias"), (5, 5, 1))
    assert [list(layer) for layer in parameters.values()] == [["kernel"], ["kernel"]]


def test_average_pooling_is_a_mean():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(network(parse_model("avg:2")).apply({}, x)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])


def test_kernels_start_with_variance_one_over_fan_in():
    _, parameters = initialised(parse_model("conv:64@5 dense:300"), (8, 8, 3))
    for layer, fan_in in (("layer_0", 75), ("layer_1", 8 * 8 * 64)):
        kernel = np.asarray(parameters[layer]["kernel"])
        assert abs(kernel.var() * fan_in - 1) < 0.1
        assert not np.any(parameters[layer]["bias"])


@pytest.mark.parametrize("connectivity", ["conv", "local", "full"])
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"alexnet_v2", "vgg_16"}))
def test_every_layer_computes_in_the_type_that_is_asked_for(name, connectivity):
    """No product of a bfloat16 network takes float32 operands, and its logits and gradients come back as float32."""
    shape = (40, 1) if name.startswith("mnist1d") else (28, 28, 1)
    model = ARCHITECTURES.get(name).with_num_classes(10).with_connectivity(connectivity)
    net = network(model, jnp.bfloat16)
    x = jnp.ones((2, *shape))
    parameters, statistics = jax.eval_shape(lambda: initial(net, jax.random.key(0), shape))
    assert {leaf.dtype for leaf in jax.tree.leaves((parameters, statistics))} == {jnp.dtype(jnp.float32)}
    gradient = jax.grad(lambda p, s: training_logits(net, p, s, x)[0].sum())
    operands = {
        variable.aval.dtype
        for equation in equations(jax.make_jaxpr(gradient)(parameters, statistics).jaxpr)
        if equation.primitive.name in ("dot_general", "cnnlib_correlate", "cnnlib_kernel_gradient")
        or equation.primitive.name.startswith("cnnlib_local")
        for variable in equation.invars
    }
    assert operands == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(lambda p, s: logits(net, p, s, x), parameters, statistics).dtype == jnp.float32
    gradients = jax.eval_shape(gradient, parameters, statistics)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def equations(jaxpr):
    """The equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_lenet5_and_its_seed_make_the_parameters():
    model = lenet5().with_num_classes(10)
    _, first = initialised(model, (28, 28, 1), seed=0)
    _, again = initialised(model, (28, 28, 1), seed=0)
    _, other = initialised(model, (28, 28, 1), seed=1)
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert not np.array_equal(first["layer_0"]["kernel"], other["layer_0"]["kernel"])


DEEP = "conv:8@3 relu " + 4 * "residual(conv:8@3 norm relu conv:8@3) " + "max:4 dense:3"


def gradient_of(net, remat):
    """Of a number that everything that comes out is in, of parameters and input; and the statistics after it."""

    def total(parameters, statistics, x):
        output, seen = training_logits(net, parameters, statistics, x, remat)
        return jnp.sin(output).sum(), seen

    return jax.grad(total, argnums=(0, 2), has_aux=True)


def test_maps_that_are_computed_again_give_the_same_gradients_and_statistics():
    net = network(parse_model(DEEP))
    keys = jax.random.split(jax.random.key(1), 3)
    parameters, statistics = jax.jit(jax.vmap(lambda key: initial(net, key, (16, 16, 1))))(keys)
    x = jnp.asarray(np.random.RandomState(0).normal(size=(3, 4, 16, 16, 1)), jnp.float32)
    kept, again = (jax.jit(jax.vmap(gradient_of(net, remat)))(parameters, statistics, x) for remat in (False, True))
    assert jax.tree.structure(kept) == jax.tree.structure(again)
    for own, other in zip(jax.tree.leaves(again), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_none_stays_none():
    net = network(parse_model(DEEP))
    parameters, statistics = jax.jit(lambda key: initial(net, key, (16, 16, 1)))(jax.random.key(1))
    parameters["layer_7"]["bias"] = jnp.full_like(parameters["layer_7"]["bias"], jnp.nan)
    found, _ = jax.jit(gradient_of(net, remat=True))(
        parameters, statistics, jnp.asarray(np.random.RandomState(0).normal(size=(2, 16, 16, 1)), jnp.float32)
    )
    assert all(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(found[0]))


@pytest.mark.slow
@each_implementation
def test_maps_that_are_computed_again_are_not_kept(implementation):
    net = network(parse_model(DEEP))
    sizes = []
    with using(implementation):
        for remat in (False, True):
            arguments = jax.eval_shape(
                lambda: (*initial(net, jax.random.key(0), (64, 64, 1)), jnp.ones((16, 64, 64, 1)))
            )
            program = jax.jit(gradient_of(net, remat)).lower(*arguments).compile()
            sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.7 * sizes[0]


def test_stretches_end_with_each_pooling_and_hold_each_residual_alone():
    layers = parse_model("conv:4@3 relu max:2 conv:4@3 residual(conv:4@3) relu avg:2 dense:3").layers
    assert stretches(layers) == [(0, 3), (3, 4), (4, 5), (5, 7), (7, 8)]
    assert stretches(parse_model("residual(conv:1@3)").layers) == [(0, 1)]
