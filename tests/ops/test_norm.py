"""Batch normalisation against its formulas in NumPy: forward, backward, over steps, in lanes, through a whole run."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from populations import assert_close, examples, lane, lanes, recipe, trained
from problems import initial, logits, training_logits
from resuming import EXPERIMENT, Listener, comparable, interrupted

from cnnlib import ops
from cnnlib.config.schema import Arm, Augment, Optim
from cnnlib.nn.equivalence import expand, parameter_shapes, project, tied
from cnnlib.nn.network import network, pools_before_bias
from cnnlib.runs.runner import run
from cnnlib.runs.session import Options
from cnnlib.spec.budget import match, scaled
from cnnlib.spec.counts import count
from cnnlib.spec.layers import Norm
from cnnlib.spec.model import walk
from cnnlib.spec.notation import parse_model
from cnnlib.train import evaluate
from cnnlib.train import step as train
from cnnlib.train.checkpoint import sha256

NORMED = "conv:4@3:nobias norm relu max:2 dense:8:nobias norm relu dense:3"
SHAPES = [(6, 3), (5, 4, 3), (4, 5, 3, 2)]


def normed(x, scale, bias, epsilon=1e-5):
    """The paper's algorithm 1, each channel by itself, with its mean and variance."""
    y, means, variances = np.empty_like(x), [], []
    for channel in range(x.shape[-1]):
        values = x[..., channel]
        mean = values.sum() / values.size
        variance = ((values - mean) ** 2).sum() / values.size
        y[..., channel] = scale[channel] * (values - mean) / np.sqrt(variance + epsilon) + bias[channel]
        means.append(mean)
        variances.append(variance)
    return y, np.asarray(means), np.asarray(variances)


def problem(shape, seed=0):
    random = np.random.RandomState(seed)
    return 3 + 2 * random.normal(size=shape), random.normal(size=shape[-1]), random.normal(size=shape[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_training_uses_the_batch_and_moves_the_running_statistics(shape, float64):
    model = network(parse_model("norm"), jnp.float64)
    x, scale, bias = problem(shape)
    parameters = {"layer_0": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
    mean, variance = np.zeros(shape[-1]), np.ones(shape[-1])
    statistics = {"layer_0": {"mean": jnp.asarray(mean), "variance": jnp.asarray(variance)}}
    for step in range(3):
        x, _, _ = problem(shape, seed=step)
        expected, *seen = normed(x, scale, bias)
        variables = {"params": parameters, "batch_stats": statistics}
        y, changed = model.apply(variables, jnp.asarray(x), training=True, mutable=["batch_stats"])
        statistics = changed["batch_stats"]
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
        mean, variance = 0.9 * mean + 0.1 * seen[0], 0.9 * variance + 0.1 * seen[1]
        np.testing.assert_allclose(statistics["layer_0"]["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(statistics["layer_0"]["variance"], variance, rtol=1e-12)
    # Evaluation uses what has been seen, and any example by itself.
    x, _, _ = problem(shape, seed=9)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    variables = {"params": parameters, "batch_stats": statistics}
    np.testing.assert_allclose(model.apply(variables, jnp.asarray(x)), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(model.apply(variables, jnp.asarray(x[2:3])), expected[2:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_those_of_finite_differences(shape, float64):
    operands = problem(shape)
    random = np.random.RandomState(5)
    factors = [jnp.asarray(random.normal(size=size)) for size in (shape, shape[-1:], shape[-1:])]

    @jax.jit
    def loss(*operands):
        # The running statistics as well, though training never differentiates them.
        return sum(
            (jnp.sin(y) * factor).sum() for y, factor in zip(ops.batch_norm(*operands, 0.1), factors, strict=True)
        )

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(jnp.asarray, operands))
    for position, gradient in enumerate(gradients):
        for index in list(np.ndindex(operands[position].shape))[:40]:
            ends = []
            for step in (1e-5, -1e-5):
                moved = [operand.copy() for operand in operands]
                moved[position][index] += step
                ends.append(float(loss(*moved)))
            assert float(np.asarray(gradient)[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)
    # Forward, and twice: a Hessian is symmetric.
    tangents = tuple(jnp.asarray(random.normal(size=operand.shape)) for operand in operands)
    _, along = jax.jit(lambda *tangents: jax.jvp(loss, tuple(map(jnp.asarray, operands)), tangents))(*tangents)
    expected = sum(float((g * t).sum()) for g, t in zip(gradients, tangents, strict=True))
    assert float(along) == pytest.approx(expected, rel=1e-10)
    x, scale, bias = map(jnp.asarray, operands)
    hessian = np.asarray(jax.jit(jax.hessian(lambda x: loss(x, scale, bias)))(x)).reshape(x.size, x.size)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)


def test_a_channel_that_is_the_same_everywhere_becomes_its_bias():
    x = jnp.full((4, 3, 3, 2), 7.0)
    y, mean, variance = ops.batch_norm(x, jnp.ones(2), jnp.asarray([0.5, -1.0]), 1e-5)
    np.testing.assert_array_equal(y, np.broadcast_to([0.5, -1.0], y.shape))
    assert mean.tolist() == [7, 7] and variance.tolist() == [0, 0]


def test_values_far_from_zero_keep_their_variance():
    # A mean of squares less the square of the mean would be off by hundreds in float32.
    x = jnp.asarray(1e4 + np.random.RandomState(0).normal(size=(4096, 1)), jnp.float32)
    _, _, variance = ops.batch_norm(x, jnp.ones(1), jnp.zeros(1), 1e-5)
    np.testing.assert_allclose(variance, np.asarray(x, np.float64).var(0), rtol=1e-3)


def test_bfloat16_is_normalised_in_float32():
    x, scale, bias = problem((64, 5, 3))
    narrow = jnp.asarray(x + 50, jnp.bfloat16)
    y, mean, variance = ops.batch_norm(narrow, jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32), 1e-5)
    expected = normed(np.asarray(narrow, np.float64), scale, bias)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    for found, wanted, tolerance in zip((y, mean, variance), expected, (2**-8, 1e-5, 1e-4), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=1e-4)
    net = network(parse_model(NORMED), jnp.bfloat16)
    parameters, statistics = initial(net, jax.random.key(0), (12, 12, 1))
    images = jnp.asarray(np.random.RandomState(0).normal(size=(20, 12, 12, 1)), jnp.float32)
    wide = training_logits(network(parse_model(NORMED)), parameters, statistics, images)
    near = training_logits(net, parameters, statistics, images)
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(near), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.1)
    evaluated = logits(net, parameters, statistics, images)
    np.testing.assert_allclose(
        evaluated, logits(network(parse_model(NORMED)), parameters, statistics, images), atol=0.1
    )


def test_pytorch_s_norm_gives_the_same_but_for_the_running_variance():
    torch = pytest.importorskip("torch")
    x, scale, bias = problem((6, 4, 5, 3))
    theirs = torch.nn.BatchNorm2d(3, eps=1e-5, momentum=0.1).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(scale))
        theirs.bias.copy_(torch.from_numpy(bias))
        y = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy().transpose(0, 2, 3, 1)
    found, mean, variance = ops.batch_norm(*(jnp.asarray(value, jnp.float32) for value in (x, scale, bias)), 1e-5)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs.running_mean.numpy(), 0.1 * np.asarray(mean), rtol=1e-5)
    unbiased = np.asarray(variance) * 120 / 119
    np.testing.assert_allclose(theirs.running_var.numpy(), 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_no_maximum_is_taken_before_a_norm_whose_scale_may_be_negative():
    model = parse_model("conv:2@1:nobias norm relu max:2")
    assert pools_before_bias(model.layers) == {}
    x = np.random.RandomState(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    parameters = {
        "layer_0": {"kernel": jnp.eye(2).reshape(1, 1, 2, 2)},
        "layer_1": {"scale": jnp.asarray([-1.0, 2.0]), "bias": jnp.asarray([0.5, 0.0])},
    }
    statistics = {"layer_1": {"mean": jnp.zeros(2), "variance": jnp.ones(2)}}
    y, _, _ = normed(x.astype(np.float64), [-1, 2], [0.5, 0])
    expected = np.maximum(y, 0).reshape(3, 2, 2, 2, 2, 2).max(axis=(2, 4))
    variables = {"params": parameters, "batch_stats": statistics}
    found, _ = network(model).apply(variables, jnp.asarray(x), training=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Pooling that is there before the norm still comes before the bias.
    assert pools_before_bias(parse_model("conv:2@3 relu max:2 norm").layers) == {0: 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        NORMED,
        pytest.param(
            "conv:2@3:nobias norm tanh residual(norm conv:2@3 norm|conv:2@1 norm) dense:3", marks=pytest.mark.slow
        ),
    ],
)
def test_the_three_readings_stay_one_function_in_training_too(text, float64):
    model, shape = parse_model(text), (7, 6, 2)
    random = np.random.RandomState(0)
    parameters = jax.tree.map(
        lambda like: jnp.asarray(random.normal(size=like.shape)), parameter_shapes(model, shape, jnp.float64)
    )
    _, statistics = initial(network(model), jax.random.key(0), shape)
    statistics = jax.tree.map(lambda leaf: jnp.asarray(random.uniform(1, 2, leaf.shape)), statistics)
    x = jnp.asarray(random.normal(size=(5, *shape)))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def outputs(reading, parameters, training):
        net, variables = network(reading, jnp.float64), {"params": parameters, "batch_stats": statistics}
        if training:
            return net.apply(variables, x, training=True, mutable=["batch_stats"])
        return net.apply(variables, x)

    found = {}
    for connectivity in ("conv", "local", "full"):
        reading = model.with_connectivity(connectivity)
        assert [layer for layer in walk(reading.layers) if layer == Norm()] == [
            layer for layer in walk(model.layers) if layer == Norm()
        ]
        expanded = expand(model, parameters, shape, connectivity)
        drawn = initial(network(reading), jax.random.key(0), shape)
        assert jax.tree.map(jnp.shape, (expanded, statistics)) == jax.tree.map(jnp.shape, drawn)
        gradient = jax.jit(
            jax.grad(lambda p, reading=reading: jnp.square(outputs(reading, p, training=True)[0]).sum())
        )(expanded)
        back = project(reading, expanded, shape, "conv")
        found[connectivity] = (
            *(outputs(reading, expanded, training) for training in (False, True)),
            tied(model, gradient, shape, connectivity),
        )
        jax.tree.map(np.testing.assert_array_equal, back.parameters, parameters)
        assert back.total == 0 and not any("norm" in path for path in back.distance)
    for connectivity in ("local", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found[connectivity], found["conv"]
        )


def test_widths_are_matched_and_scaled_with_norms_in_between():
    model, shape = parse_model(NORMED).with_num_classes(3), (12, 12, 1)
    twice = scaled(model, 2.0)
    assert str(twice) == NORMED.replace("conv:4", "conv:8").replace("dense:8", "dense:16")
    total = count(twice, shape)
    assert total.norm_parameters == 2 * (8 + 16) and total.biases == 3
    assert total.connections == total.macs == count(parse_model(str(twice).replace("norm ", "")), shape).connections
    assert match(model, total.parameters, "parameters", shape).model == twice


# In training: lanes, divergence, evaluation, resuming.


def test_a_population_with_norms_trains_as_each_of_its_lanes_alone():
    rule = recipe(NORMED)
    numbers = lanes(7, 8, 9, learning_rate=[0.01, 0.02, 0.005])
    initialize, epoch = jax.jit(train.initialize(rule)), jax.jit(train.epoch(rule))
    alone = []
    for index in range(3):
        state = initialize(lane(numbers, index))
        for _ in range(2):
            state, _ = epoch(state, lane(numbers, index), examples())
        alone.append(state)
    for at_a_time in (1, 3):
        together, _ = trained(rule, numbers, at_a_time=at_a_time)
        for index in range(3):
            assert_close(lane(together.parameters, index), alone[index].parameters)
            assert_close(lane(together.statistics, index), alone[index].statistics)


def test_running_statistics_are_those_of_the_steps():
    """One norm of the pixels and a rate of zero: the same examples in the order of the seed, followed in NumPy."""
    rule = recipe("norm dense:3", optim=Optim("sgd"), batch_size=40)
    state, _ = trained(rule, lanes(5, learning_rate=0.0), epochs=2)
    data, mean, variance = examples(), np.zeros(1), np.ones(1)
    pixels = (np.asarray(data.x, np.float64) - 20) / 30
    for epoch in range(2):
        key = jax.random.fold_in(train.keys_of(lane(lanes(5), 0)).order, epoch)
        for batch in np.asarray(jax.random.permutation(key, 160)).reshape(4, 40):
            mean = 0.9 * mean + 0.1 * pixels[batch].mean()
            variance = 0.9 * variance + 0.1 * pixels[batch].var()
    (found,) = lane(state.statistics, 0).values()
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-4)


def test_evaluation_does_not_depend_on_the_company():
    rule = recipe(NORMED)
    states, _ = trained(rule, lanes(0), epochs=1)
    data = examples(103, seed=1)
    parameters, statistics = lane(states.parameters, 0), lane(states.statistics, 0)
    whole = jax.jit(evaluate.evaluate(rule))(parameters, statistics, data)
    for batch_size in (1, 10):
        sums = jax.jit(evaluate.evaluate(rule, batch_size))(parameters, statistics, data)
        assert (sums.correct, sums.examples) == (whole.correct, 103)
        np.testing.assert_allclose(sums.loss, whole.loss, rtol=1e-5)
    one = data._replace(x=data.x[:1], y=data.y[:1])
    rest = data._replace(x=data.x[1:], y=data.y[1:])
    parts = [jax.jit(evaluate.evaluate(rule))(parameters, statistics, part).loss for part in (one, rest)]
    np.testing.assert_allclose(sum(parts), whole.loss, rtol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_lane_that_diverges_keeps_its_last_finite_statistics(at_a_time):
    # A norm forgives any rate in front of it, and the last layer has none.
    rule = recipe("dense:8 norm relu dense:8 dense:3", optim=Optim("sgd"))
    numbers = lanes(0, 1, 2, learning_rate=[0.01, 1e18, 0.01])
    before, _ = trained(rule, numbers, epochs=1, at_a_time=at_a_time)
    states, _ = trained(rule, numbers, epochs=3, at_a_time=at_a_time)
    assert states.diverged.tolist() == [False, True, False]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((states.parameters, states.statistics)))
    assert before.diverged[1]
    jax.tree.map(np.testing.assert_array_equal, lane(states.statistics, 1), lane(before.statistics, 1))
    without, _ = trained(rule, lanes(0, 5, 2), epochs=3, at_a_time=at_a_time)
    for index in (0, 2):
        assert_close(lane(states.statistics, index), lane(without.statistics, index))


def test_statistics_that_are_not_finite_mark_a_lane_though_its_loss_is():
    # The variance overflows, and what is divided by it is 0: the loss is that of a net that answers by its biases.
    rule = recipe("norm dense:3", batch_size=160)
    data = examples()._replace(deviation=jnp.asarray([1e-25]))
    states, sums = jax.jit(train.over_lanes(train.epoch(rule), 1, lane_arguments=2))(
        jax.jit(train.over_lanes(train.initialize(rule), 1))(lanes(0)), lanes(0), data
    )
    assert np.isfinite(sums.loss).all() and states.diverged.tolist() == [True]
    assert lane(states.statistics, 0)["layer_0"]["variance"].tolist() == [1]


@pytest.mark.slow
def test_a_net_that_starts_as_a_convolution_begins_with_its_statistics():
    conv = recipe(NORMED)
    model = parse_model(NORMED).full()
    freed = conv._replace(network=network(model), start=conv.network)
    ours, theirs = (jax.jit(train.initialize(each))(lane(lanes(3), 0)) for each in (freed, conv))
    jax.tree.map(np.testing.assert_array_equal, ours.statistics, theirs.statistics)
    x = jnp.asarray(np.random.RandomState(0).normal(size=(20, 12, 12, 1)), jnp.float32)
    found, expected = (
        training_logits(each.network, state.parameters, state.statistics, x)
        for each, state in ((freed, ours), (conv, theirs))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)
    # The convolution's scales and biases are at the paths of its own net's.
    assert float(jax.jit(evaluate.distance_from_conv(freed))(ours.parameters)) == 0


def test_statistics_are_part_of_the_fingerprint_where_there_are_any():
    parameters = {"layer_0": {"scale": np.ones(2, np.float32)}}
    statistics = {"layer_0": {"mean": np.zeros(2, np.float32)}}
    assert sha256(parameters, {}) == sha256(parameters) != sha256(parameters, statistics)
    joined = {"layer_0": {**parameters["layer_0"], **statistics["layer_0"]}}
    assert sha256(parameters, statistics) == sha256(joined)


@pytest.mark.slow
def test_a_resumed_run_with_norms_ends_as_one_that_was_not_interrupted(tmp_path):
    net = parse_model("avg:4 conv:4@3:nobias norm relu dense:8:nobias norm relu dense:classes")
    experiment = replace(EXPERIMENT, arms=(Arm("conv", net),), augment=Augment(shift=1))
    run(experiment, "tiny", tmp_path / "whole", Listener())
    interrupted(tmp_path / "resumed", 1, experiment)
    run(experiment, "tiny", tmp_path / "resumed", Listener(), Options(resume=True))
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    lanes_found = comparable(tmp_path / "whole")[0]["arms"][0]["lanes"]
    assert len({each["parameters_sha256"] for each in lanes_found}) == len(lanes_found)
