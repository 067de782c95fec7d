"""What training means: lanes, chance, divergence, evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from populations import (
    CONV,
    FULL,
    TOLERANCE,
    assert_close,
    assert_equal,
    differ,
    examples,
    lane,
    lanes,
    programs,
    recipe,
    trained,
)
from problems import logits

from cnnlib.config.schema import Augment, LaneNumbers, Optim
from cnnlib.nn.network import network
from cnnlib.spec.notation import parse_model
from cnnlib.train import evaluate as evaluation
from cnnlib.train import step as train
from cnnlib.train.augment import normalize
from cnnlib.train.types import Examples


@pytest.mark.parametrize("reading", [pytest.param("local", marks=pytest.mark.slow), "full"])
@pytest.mark.slow
def test_a_net_may_start_as_the_convolution_of_its_seed(reading):
    conv = recipe()
    model = parse_model(CONV).with_connectivity(reading)
    freed = conv._replace(network=network(model), start=conv.network)
    numbers = lanes(7, 8)
    before, after = (jax.jit(train.over_lanes(train.initialize(each), 1))(numbers) for each in (conv, freed))
    data = examples()
    x = normalize(data.x[:20], data.mean, data.deviation)
    for index in range(2):
        expected, found = (
            logits(each.network, lane(states.parameters, index), {}, x)
            for each, states in ((conv, before), (freed, after))
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert float(jax.jit(evaluation.distance_from_conv(freed))(lane(after.parameters, index))) == 0
    # It is free to leave: training moves it away from every convolution.
    states, _ = trained(freed, numbers, epochs=1)
    distances = [
        float(jax.jit(evaluation.distance_from_conv(freed))(lane(states.parameters, index))) for index in range(2)
    ]
    assert all(0.01 < distance < 1 for distance in distances)


@pytest.mark.parametrize("text", [CONV, pytest.param(FULL, marks=pytest.mark.slow)])
def test_a_lane_equals_the_same_model_trained_alone(text):
    numbers = lanes(7, 8, 9, learning_rate=[0.01, 0.02, 0.005], label_smoothing=[0.0, 0.1, 0.2])
    initialize, epoch = jax.jit(train.initialize(recipe(text))), jax.jit(train.epoch(recipe(text)))
    alone = []
    for index in range(3):
        state = initialize(lane(numbers, index))
        for _ in range(2):
            state, _ = epoch(state, lane(numbers, index), examples())
        alone.append(state.parameters)
    for at_a_time in (1, 2, 3):
        together, _ = trained(recipe(text), numbers, at_a_time=at_a_time)
        for index in range(3):
            assert_close(lane(together.parameters, index), alone[index])


def test_lanes_of_other_seeds_or_other_numbers_differ():
    states, _ = trained(
        recipe(), lanes(0, 1, 0, 0, 0, learning_rate=[0.01] * 3 + [0.02, 0.01], weight_decay=[0, 0, 0, 0, 0.1])
    )
    parameters = states.parameters
    assert differ(lane(parameters, 0), lane(parameters, 1))
    assert_close(lane(parameters, 0), lane(parameters, 2))  # the same lane twice
    assert differ(lane(parameters, 0), lane(parameters, 3))
    assert differ(lane(parameters, 0), lane(parameters, 4))


def test_the_same_program_twice_gives_the_same_bits():
    first, _ = trained(recipe(), lanes(3, 4))
    again, _ = trained(recipe(), lanes(3, 4))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))


def test_training_learns():
    states, first = trained(recipe(), lanes(0, 1), epochs=1)
    _, last = trained(recipe(epochs=12), lanes(0, 1), epochs=12)
    assert np.all(last.loss < 0.7 * first.loss)
    assert np.all(last.examples == 160) and np.all(states.epochs == 1)


def test_an_epoch_visits_each_example_at_most_once_in_an_order_of_its_own():
    """With a learning rate of zero nothing moves, so the sums tell which examples were seen."""
    frozen = lanes(0, learning_rate=0.0)
    all_seen = recipe(FULL, batch_size=16)
    states, sums = trained(all_seen, frozen, epochs=1)
    whole = jax.jit(evaluation.evaluate(all_seen))(lane(states.parameters, 0), {}, examples())
    np.testing.assert_allclose(sums.loss[0], whole.loss, rtol=1e-5)
    assert sums.examples[0] == 160
    # 160 examples in batches of 48: each epoch leaves out 16 of them, other ones each time.
    some = recipe(FULL, batch_size=48)
    losses = [float(trained(some, frozen, epochs=n)[1].loss[0]) for n in (1, 2, 3)]
    assert trained(some, frozen, epochs=1)[1].examples[0] == 144
    assert len(set(losses)) == 3


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_lane_that_diverges_is_marked_and_frozen_and_the_others_do_not_notice(at_a_time):
    sgd = recipe(optim=Optim("sgd"))
    with_bomb, sums = trained(sgd, lanes(0, 1, 2, learning_rate=[0.01, 1e8, 0.01]), epochs=3, at_a_time=at_a_time)
    without, _ = trained(sgd, lanes(0, 5, 2), epochs=3, at_a_time=at_a_time)
    assert with_bomb.diverged.tolist() == [False, True, False]
    assert with_bomb.epochs[0] == 3 and with_bomb.epochs[1] < 3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(lane(with_bomb.parameters, 1)))
    assert not np.isfinite(sums.loss[1])
    for index in (0, 2):
        assert_close(lane(with_bomb.parameters, index), lane(without.parameters, index))


def test_a_lane_once_marked_stays_as_it_is():
    model, numbers = recipe(FULL), lanes(0)
    states, _ = trained(model, numbers, epochs=1)
    marked = states._replace(diverged=jnp.asarray([True]))
    after, _ = programs(model, 1)[1](marked, numbers, examples())
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(marked)))


def test_a_last_step_that_leaves_nothing_finite_counts_as_diverged():
    one_step = recipe(FULL, optim=Optim("sgd"), batch_size=160)
    states, sums = trained(one_step, lanes(0, 1, learning_rate=[3e38, 0.01], weight_decay=[1e6, 0.0]), epochs=1)
    assert np.isfinite(sums.loss).all()  # the loss is that of the parameters before the step
    assert states.diverged.tolist() == [True, False] and states.epochs.tolist() == [0, 1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states.parameters))


def test_evaluation_counts_every_example_once_whatever_the_batch():
    """A model that answers with the brightest of three pixels, whose right answers are counted by hand."""
    model = recipe("dense:3")._replace(input_shape=(3, 1))
    x = np.random.RandomState(0).randint(0, 256, (103, 3, 1)).astype(np.uint8)
    y = np.random.RandomState(1).randint(0, 3, 103).astype(np.int32)
    data = Examples(jnp.asarray(x), jnp.asarray(y), jnp.asarray([0.0]), jnp.asarray([255.0]))
    parameters = {"layer_0": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
    logits = x[..., 0] / 255
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(103), y]
    for batch_size in (1, 10, 103, 500):
        sums = jax.jit(evaluation.evaluate(model, batch_size))(parameters, {}, data)
        assert sums.examples == 103
        assert sums.correct == (logits.argmax(1) == y).sum()
        np.testing.assert_allclose(sums.loss, losses.sum(), rtol=1e-5)


def test_label_smoothing_changes_the_training_loss_and_not_the_evaluation():
    smoothed, sums = trained(recipe(FULL), lanes(0, learning_rate=0.0, label_smoothing=0.3), epochs=1)
    plain, plain_sums = trained(recipe(FULL), lanes(0, learning_rate=0.0), epochs=1)
    # At initialisation the cross-entropy and its mean over classes are both near log 3, but not equal.
    assert float(sums.loss[0]) != pytest.approx(float(plain_sums.loss[0]), rel=1e-3)
    assert_close(smoothed.parameters, plain.parameters)
    evaluate = jax.jit(evaluation.evaluate(recipe(FULL)))
    a, b = (evaluate(lane(state.parameters, 0), {}, examples()).loss for state in (smoothed, plain))
    assert a == b


def test_a_full_net_is_indifferent_to_a_permutation_of_pixels_that_its_first_layer_absorbs():
    """Permuted pixels with permuted first-layer rows train to the same net with permuted rows: it has no locality."""
    full = recipe(FULL, optim=Optim("sgd"))
    data = examples()
    order = np.random.RandomState(0).permutation(144)
    shuffled = data._replace(x=data.x.reshape(160, 144)[:, order].reshape(data.x.shape))
    state = jax.jit(train.initialize(full))(lane(lanes(0), 0))
    first = state.parameters["layer_0"]
    moved = {**state.parameters, "layer_0": {**first, "kernel": first["kernel"][order]}}
    epoch = jax.jit(train.epoch(full))
    after, _ = epoch(state, lane(lanes(0), 0), data)
    after_moved, _ = epoch(state._replace(parameters=moved), lane(lanes(0), 0), shuffled)
    np.testing.assert_allclose(
        after.parameters["layer_0"]["kernel"][order], after_moved.parameters["layer_0"]["kernel"], **TOLERANCE
    )


def test_augmentation_and_crops_reach_training_and_evaluation():
    cropped = recipe(FULL, augment=Augment(shift=1, crop=10, flip=True))._replace(input_shape=(10, 10, 1))
    states, _ = trained(cropped, lanes(0), epochs=1)
    plain, _ = trained(cropped._replace(augment=Augment(crop=10)), lanes(0), epochs=1)
    assert differ(states.parameters, plain.parameters)
    assert jax.jit(evaluation.evaluate(cropped))(lane(states.parameters, 0), {}, examples()).examples == 160


def test_bfloat16_trains_to_about_the_same_loss():
    narrow = recipe()._replace(network=network(parse_model(CONV), jnp.bfloat16))
    _, sums = trained(narrow, lanes(0, 1))
    _, exact = trained(recipe(), lanes(0, 1))
    np.testing.assert_allclose(sums.loss, exact.loss, rtol=0.1)


def test_every_use_of_chance_has_a_key_of_its_own():
    keys = train.keys_of(LaneNumbers(0, 0, 0.1, 0.9, 0.0, 0.0, 0.0, 0.0))
    data = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys]
    assert len(set(data)) == len(keys) == 4


def test_a_lane_trains_on_as_many_examples_as_asked_drawn_by_its_order_seed():
    part = recipe(FULL)._replace(examples=60)
    own = [train.own_examples(part, lane(lanes(0, 0, 1, orders=[5, 6, 5]), i), examples()) for i in range(3)]
    assert all(len(set(one.tolist())) == 60 for one in own)
    assert (own[0] == own[2]).all() and not (own[0] == own[1]).all()
    # Examples that are none of its own do not matter to a lane.
    data = examples()
    others = np.setdiff1d(np.arange(160), own[0])
    spoilt = data._replace(y=data.y.at[others].set(0), x=data.x.at[others].set(255))
    train_one = jax.jit(train.epoch(part))
    numbers = lane(lanes(0, orders=[5]), 0)
    state = train.initialize(part)(numbers)
    alike, _ = train_one(state, numbers, data), train_one(state, numbers, spoilt)
    assert_equal(train_one(state, numbers, data)[0].parameters, train_one(state, numbers, spoilt)[0].parameters)
    assert alike[1].examples == 60
    assert jax.jit(evaluation.fit(part))(alike[0].parameters, {}, numbers, data).examples == 60


def test_seed_draws_the_weights_and_order_seed_the_rest():
    draw = train.initialize(recipe(FULL))
    one, two, three = (
        draw(lane(lanes(seed, orders=[order]), 0)).parameters for seed, order in ((0, 0), (0, 9), (9, 0))
    )
    assert_equal(one, two)
    assert differ(one, three)
    keys = [train.keys_of(lane(lanes(seed, orders=[order]), 0)) for seed, order in ((0, 0), (0, 9), (9, 0))]
    words = [tuple(np.asarray(jax.random.key_data(key)).tolist() for key in each) for each in keys]
    assert words[0][0] == words[1][0] and words[0][1:] == words[2][1:] and words[0][1] != words[1][1]


def test_passes_are_epochs_within_an_epoch():
    twice = recipe(FULL)._replace(passes=2, epochs=2)
    together, _ = trained(twice, lanes(0), epochs=1)
    apart, _ = trained(recipe(FULL), lanes(0), epochs=2)
    assert_equal(together.parameters, apart.parameters)


def test_stored_order_is_the_same_each_epoch():
    still = recipe(FULL)._replace(reshuffle=False, passes=1)
    data, numbers = examples(), lane(lanes(0), 0)
    other = lane(lanes(0, orders=[9]), 0)
    state = train.initialize(still)(numbers)
    step = jax.jit(train.epoch(still))
    assert_equal(step(state, numbers, data)[0].parameters, step(state, other, data)[0].parameters)
