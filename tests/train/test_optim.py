"""Update rules against their papers' formulas, written out in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlib.config.schema import LaneNumbers, Optim
from cnnlib.train.optim import optimizer, schedule, sparsity

NUMBERS = LaneNumbers(
    0, 0, learning_rate=0.1, momentum=0.8, weight_decay=0.05, label_smoothing=0.0, l1=0.0, l1_threshold=0.0
)
START = np.asarray([1.0, -2.0, 0.5])


def gradient(x):
    return x**3 - 0.3


def trained(name, steps=6, numbers=NUMBERS, schedule="constant"):
    rule = optimizer(Optim(name, schedule), numbers, steps)
    x = jnp.asarray(START, jnp.float32)
    state = rule.init(x)

    @jax.jit
    def step(x, state):
        update, state = rule.update(gradient(x), state, x)
        return x + update, state

    for _ in range(steps):
        x, state = step(x, state)
    return x


def expected(name, steps=6):
    x, velocity, square = START.copy(), np.zeros(3), np.zeros(3)
    for step in range(1, steps + 1):
        g = gradient(x) + (0 if name == "adamw" else NUMBERS.weight_decay * x)
        if name == "sgd":
            velocity = NUMBERS.momentum * velocity + g
            x = x - NUMBERS.learning_rate * velocity
            continue
        velocity = NUMBERS.momentum * velocity + (1 - NUMBERS.momentum) * g
        square = 0.999 * square + 0.001 * g**2
        direction = velocity / (1 - NUMBERS.momentum**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        if name == "adamw":  # Loshchilov and Hutter 2019: decay apart from the gradient
            direction = direction + NUMBERS.weight_decay * x
        x = x - NUMBERS.learning_rate * direction
    return x


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_updates_follow_the_formulas(name):
    np.testing.assert_allclose(trained(name), expected(name), rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("course", ["constant", "cosine", "one_cycle"])
def test_numbers_may_be_traced_and_differ_by_lane(name, course):
    fast = NUMBERS._replace(learning_rate=0.2, momentum=0.5, weight_decay=0.0)
    both = LaneNumbers(*(jnp.asarray(pair, jnp.float32) for pair in zip(NUMBERS, fast, strict=True)))
    together = jax.jit(jax.vmap(lambda numbers: trained(name, numbers=numbers, schedule=course)))(both)
    alone = [trained(name, numbers=numbers, schedule=course) for numbers in (NUMBERS, fast)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4)
    assert not np.allclose(alone[0], alone[1])


def test_schedules_have_the_courses_they_are_named_for():
    steps = np.arange(101)
    course = lambda name: jax.jit(jax.vmap(schedule(name, 100)))(steps)  # noqa: E731
    assert np.all(course("constant") == 1)
    cosine = course("cosine")
    np.testing.assert_allclose(cosine, (1 + np.cos(np.pi * steps / 100)) / 2, atol=1e-6)
    cycle = course("one_cycle")
    np.testing.assert_allclose([cycle[0], cycle[30], cycle[100]], [1 / 25, 1, 1 / 25e4], rtol=1e-4)
    assert np.all(np.diff(cycle[:31]) > 0) and np.all(np.diff(cycle[30:]) < 0)


@pytest.mark.parametrize("course", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_schedules_of_a_few_steps_stay_finite(course, total):
    assert all(np.isfinite(schedule(course, total)(step)) for step in range(total + 1))


# beta-LASSO.

PENALISED = NUMBERS._replace(weight_decay=0.0, l1=0.2, l1_threshold=0.6)
WEIGHTS = np.random.RandomState(3).normal(size=(6, 5))
BIAS = np.random.RandomState(4).normal(size=5)
STEPS = 8


def pulled(x):
    """A gradient that draws every weight towards a point near zero."""
    return 0.5 * (x - 0.3 * np.sin(np.arange(x.shape[-1])).reshape((1,) * (x.ndim - 1) + (-1,)))


def penalised(name, numbers=PENALISED, course="constant", traced=(0.2,)):
    rule = optimizer(Optim(name, course, l1=traced, l1_threshold=(0.6,)), numbers, STEPS)
    parameters = {"layer_0": {"kernel": jnp.asarray(WEIGHTS), "bias": jnp.asarray(BIAS)}}
    state = rule.init(parameters)

    @jax.jit
    def step(parameters, state):
        update, state = rule.update(jax.tree.map(pulled, parameters), state, parameters)
        return jax.tree.map(jnp.add, parameters, update), state

    for _ in range(STEPS):
        parameters, state = step(parameters, state)
    return parameters["layer_0"]


def penalised_by_loop(name, weights, strength, beta, rates):
    """Weight by weight: theta <- theta - eta (g + lambda sign theta), and zero where |theta| < beta lambda."""
    found = np.empty_like(weights)
    centre = np.broadcast_to(0.3 * np.sin(np.arange(weights.shape[-1])), weights.shape)
    for index, theta in np.ndenumerate(weights):
        velocity = square = 0.0
        for step, rate in enumerate(rates, start=1):
            g = 0.5 * (theta - centre[index]) + strength * np.sign(theta)
            if name == "sgd":
                velocity = 0.8 * velocity + g
                theta = theta - rate * velocity
            else:
                velocity, square = 0.8 * velocity + 0.2 * g, 0.999 * square + 0.001 * g * g
                theta = theta - rate * velocity / (1 - 0.8**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
            theta = 0.0 if abs(theta) < beta * strength else theta
        found[index] = theta
    return found


@pytest.mark.parametrize("course", ["constant", "cosine"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_beta_lasso_follows_its_algorithm_on_kernels_and_leaves_biases_alone(name, course, float64):
    relative = (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)) / 2 if course == "cosine" else np.ones(STEPS)
    found = penalised(name, course=course)
    expected = penalised_by_loop(name, WEIGHTS, 0.2, 0.6, 0.1 * relative)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(found["kernel"]) == 0, expected == 0)
    assert 0 < (expected == 0).mean() < 1
    np.testing.assert_allclose(found["bias"], penalised_by_loop(name, BIAS, 0.0, 0.0, 0.1 * relative), rtol=1e-6)
    assert sparsity({"layer_0": found}) == (expected == 0).mean()


def test_a_large_beta_keeps_a_weight_at_zero_whatever_its_gradient(float64):
    # Aggressive: from zero no single step reaches beta lambda.
    found = penalised("sgd", PENALISED._replace(l1_threshold=50.0))
    assert not np.any(found["kernel"]) and np.all(found["bias"])


def test_lanes_differ_in_lambda_and_beta_and_one_without_is_as_if_there_were_none():
    numbers = [PENALISED._replace(l1=l1, l1_threshold=beta) for l1, beta in ((0.0, 0.6), (0.2, 0.0), (0.2, 0.6))]
    together = LaneNumbers(*(jnp.asarray(column, jnp.float32) for column in zip(*numbers, strict=True)))
    kernels = jax.jit(jax.vmap(lambda n: penalised("sgd", n, traced=(0.0, 0.2))["kernel"]))(together)
    for kernel, each in zip(kernels, numbers, strict=True):
        np.testing.assert_allclose(kernel, penalised("sgd", each)["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kernels[0], penalised("sgd", numbers[0], traced=(0.0,))["kernel"], rtol=1e-5, atol=1e-6)
    assert [bool((kernel == 0).any()) for kernel in kernels] == [False, False, True]


def test_without_a_lambda_the_program_has_nothing_of_it():
    def step(optim):
        rule = optimizer(optim, PENALISED, STEPS)
        parameters = {"kernel": jnp.ones(3)}
        return str(jax.make_jaxpr(lambda p: rule.update(p, rule.init(p), p)[0])(parameters))

    assert "sign" in step(Optim(l1=(0.0, 0.1))) and "sign" not in step(Optim())
