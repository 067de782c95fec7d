"""Update rules against their papers' formulas, written out in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlib.config import LaneNumbers, Optim
from cnnlib.optim import optimizer, schedule

NUMBERS = LaneNumbers(seed=0, order_seed=0, learning_rate=0.1, momentum=0.8, weight_decay=0.05, label_smoothing=0.0)
START = np.asarray([1.0, -2.0, 0.5])


def gradient(x):
    return x**3 - 0.3


def trained(name, steps=6, numbers=NUMBERS, schedule="constant"):
    rule = optimizer(Optim(name, schedule), numbers, steps)
    x = jnp.asarray(START, jnp.float32)
    state = rule.init(x)
    for _ in range(steps):
        update, state = rule.update(gradient(x), state, x)
        x = x + update
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
    assert np.all(np.asarray([schedule("constant", 100)(s) for s in steps]) == 1)
    cosine = np.asarray([schedule("cosine", 100)(s) for s in steps])
    np.testing.assert_allclose(cosine, (1 + np.cos(np.pi * steps / 100)) / 2, atol=1e-6)
    cycle = np.asarray([schedule("one_cycle", 100)(s) for s in steps])
    np.testing.assert_allclose([cycle[0], cycle[30], cycle[100]], [1 / 25, 1, 1 / 25e4], rtol=1e-4)
    assert np.all(np.diff(cycle[:31]) > 0) and np.all(np.diff(cycle[30:]) < 0)


@pytest.mark.parametrize("course", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_schedules_of_a_few_steps_stay_finite(course, total):
    assert all(np.isfinite(schedule(course, total)(step)) for step in range(total + 1))
