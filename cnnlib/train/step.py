"""The heart of training: one model's training as pure functions, and the map over lanes.

Read this file from top to bottom. A `Recipe` holds all static settings (network, training rule, sizes). Each function
takes a recipe and returns a function of everything else. `initialize`, `epoch` and `chunk` (a part of an epoch of a
stream) train one model; the functions in evaluate.py evaluate one model. `over_lanes` maps any of these functions over
lanes (the models of an arm), and the caller compiles the result. The compiled program itself draws, augments and
normalises examples, so only a few sums leave the device between two epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, Integer, PyTree

from cnnlib.config.schema import LaneNumbers
from cnnlib.nn.equivalence import expand
from cnnlib.nn.network import Parameters, Statistics, initial, training_logits
from cnnlib.ops import primitives
from cnnlib.spec.model import Model
from cnnlib.train.augment import Draws, changed, drawn, normalize, taken
from cnnlib.train.optim import optimizer
from cnnlib.train.types import Examples, Keys, Recipe, State, Sums


def keys_of(numbers: LaneNumbers) -> Keys:
    """Return the keys of a lane. The key `init` depends on the lane's seed, all other keys on its order seed.

    The generator is always threefry, so the bits depend neither on vmap nor on JAX's default generator.
    """

    def of(seed: int | Integer[Array, ""]) -> Keys:
        return Keys(*jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(Keys._fields)))

    return of(numbers.order_seed)._replace(init=of(numbers.seed).init)


def initialize(recipe: Recipe) -> Callable[[LaneNumbers], State]:
    """Return a function that makes an untrained model: `init(numbers) -> State`."""
    model = Model(recipe.network.layers)

    def init(numbers: LaneNumbers) -> State:
        drawn = recipe.start or recipe.network
        # Statistics are per channel in every connectivity, so they need no expansion.
        parameters, statistics = initial(drawn, keys_of(numbers).init, recipe.input_shape)
        if recipe.start:
            # Draw each weight once: a compiler that draws every copy again may round some copies differently.
            parameters = jax.lax.optimization_barrier(parameters)  # type: ignore[no-untyped-call]
            parameters = expand(Model(recipe.start.layers), parameters, recipe.input_shape, model.connectivity)
        # The initial optimiser state depends neither on the step count nor on the hyperparameters.
        optimizer_state = optimizer(recipe.optim, numbers, total_steps=1).init(parameters)
        return State(parameters, statistics, optimizer_state, jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    return init


def epoch(recipe: Recipe) -> Callable[[State, LaneNumbers, Examples], tuple[State, Sums]]:
    """Return a function that trains a model for one epoch: `train(state, numbers, examples) -> (state, sums)`.

    An epoch passes over the examples `passes` times. With `reshuffle`, each pass draws a new order. Without it, each
    pass uses the stored order. A pass leaves out the last examples if they do not fill a batch. `sums` hold the
    training loss and the number of correct predictions. Both are measured on augmented examples while the parameters
    change.
    """

    def train(state: State, numbers: LaneNumbers, examples: Examples) -> tuple[State, Sums]:
        own = own_examples(recipe, numbers, examples)
        count = examples.y.shape[0] if own is None else own.shape[0]
        per_pass = count // recipe.batch_size
        steps = recipe.passes * per_pass

        def order(number: Int[Array, ""]) -> Int[Array, " count"]:
            if not recipe.reshuffle:
                return jnp.arange(count)
            return jax.random.permutation(jax.random.fold_in(keys_of(numbers).order, number), count)

        orders = jax.lax.map(order, state.epochs * recipe.passes + jnp.arange(recipe.passes))
        batches = orders[:, : per_pass * recipe.batch_size].reshape(steps, recipe.batch_size)
        batches = batches if own is None else own[batches]
        step = one_step(recipe, numbers, examples, total_steps=steps * recipe.epochs)
        model = (state.parameters, state.statistics, state.optimizer_state)
        model, (values, corrects) = jax.lax.scan(step, model, (batches, state.epochs * steps + jnp.arange(steps)))
        sums = Sums(values.sum() * recipe.batch_size, corrects.sum(), jnp.asarray(steps * recipe.batch_size, jnp.int32))
        return after(state, model, sums, epochs=1), sums

    return train


class Place(NamedTuple):
    """The place of a chunk of a stream within the training."""

    pass_number: Int[Array, ""] | np.int32
    """Number of the pass over the data, counted from the start of the training."""
    number: Int[Array, ""] | np.int32
    """Index of the chunk in its pass."""
    first_step: Int[Array, ""] | np.int32
    """Number of the first step of the chunk, counted from the start of the training."""
    steps: Int[Array, ""] | np.int32
    """Number of real batches in the chunk; padding follows them."""
    ends_epoch: Bool[Array, ""] | np.bool_


def chunk(recipe: Recipe, total_steps: int) -> Callable[[State, LaneNumbers, Examples, Place], tuple[State, Sums]]:
    """Return a function that trains a model on a chunk of a stream: `train(state, numbers, examples, place)`.

    All models see the same chunks. With `reshuffle`, each model draws its own order of the examples in a chunk, and a
    new order in each pass. A model that diverges keeps its state from before the chunk.
    """

    def train(state: State, numbers: LaneNumbers, examples: Examples, place: Place) -> tuple[State, Sums]:
        count = examples.y.shape[0]
        order = jnp.arange(count)
        if recipe.reshuffle:
            key = jax.random.fold_in(keys_of(numbers).order, place.pass_number)
            order = jax.random.permutation(jax.random.fold_in(key, place.number), count)
            order = order[jnp.argsort(order >= place.steps * recipe.batch_size, stable=True)]  # padding last
        batches = order.reshape(-1, recipe.batch_size)
        step = one_step(recipe, numbers, examples, total_steps)

        def next_step(number: Int[Array, ""], so_far: PyTree) -> PyTree:
            model, loss, correct = so_far
            model, (value, corrects) = step(model, (batches[number], place.first_step + number))
            return model, loss + value, correct + corrects

        model = (state.parameters, state.statistics, state.optimizer_state)
        nothing = (jnp.zeros(()), jnp.zeros((), jnp.int32))
        model, loss, correct = jax.lax.fori_loop(0, place.steps, next_step, (model, *nothing))
        sums = Sums(loss * recipe.batch_size, correct, jnp.asarray(place.steps * recipe.batch_size))
        return after(state, model, sums, epochs=jnp.asarray(place.ends_epoch, jnp.int32)), sums

    return train


def after(state: State, model: tuple[PyTree, ...], sums: Sums, epochs: int | Int[Array, ""]) -> State:
    """Return the trained state if all its numbers are finite. If not, return the old state, and mark it as diverged."""
    parameters, statistics, optimizer_state = model
    # The last loss was computed before the last update, so check the updated parameters as well.
    finite = jnp.isfinite(sums.loss) & all_finite((parameters, statistics)) & ~state.diverged
    trained = State(parameters, statistics, optimizer_state, state.epochs + epochs, state.diverged)
    frozen = state._replace(diverged=jnp.ones((), bool))
    kept: State = jax.tree.map(lambda new, old: jnp.where(finite, new, old), trained, frozen)
    return kept


def one_step(
    recipe: Recipe, numbers: LaneNumbers, examples: Examples, total_steps: int
) -> Callable[[PyTree, tuple[Array, Array]], tuple[PyTree, tuple[Array, Array]]]:
    """Return a function that trains a model on one batch: `step(model, (index, number)) -> (model, (loss, correct))`.

    `model` is (parameters, statistics, optimiser state). `index` selects the examples. `number` counts steps from the
    start of the training. If devices share a batch, each device takes its own rows. A device cuts its rows into
    `accumulate` pieces, which run one after another. The gradients of all pieces of all devices are added up.
    """
    rule = optimizer(recipe.optim, numbers, total_steps)
    images_last = primitives.form_in_use() == "tpu"
    key_augment = keys_of(numbers).augment

    def loss(
        parameters: Parameters, statistics: Statistics, x: Array, y: Array
    ) -> tuple[Array, tuple[Array, Statistics]]:
        output, statistics = training_logits(recipe.network, parameters, statistics, x, recipe.remat)
        targets = optax.smooth_labels(jax.nn.one_hot(y, output.shape[-1]), numbers.label_smoothing)
        losses = optax.softmax_cross_entropy(output, targets)
        return losses.sum() / recipe.batch_size, ((output.argmax(-1) == y).sum(), statistics)

    def step(model: PyTree, batch: tuple[Array, Array]) -> tuple[PyTree, tuple[Array, Array]]:
        parameters, statistics, optimizer_state = model
        index, number = batch
        key = jax.random.fold_in(key_augment, number)
        # Draw for the whole batch, so that the draws do not depend on shards or pieces.
        draws = drawn(key, recipe.batch_size, examples.x.shape[1:-1], recipe.augment)

        def piece(index: Array, draws: Draws) -> tuple[PyTree, Statistics]:
            """Return the sums over a piece of the batch, and the new statistics."""
            images = taken(examples.x, index, images_last)
            x = normalize(changed(images, draws, recipe.augment), examples.mean, examples.deviation)
            (value, (correct, seen)), gradient = jax.value_and_grad(loss, has_aux=True)(
                parameters, statistics, x, examples.y[index]
            )
            return (gradient, value, correct), seen

        if recipe.data_axis is None:
            rows: tuple[Array, Draws] = (index, draws)
        else:
            size = recipe.batch_size // recipe.shards
            first = jax.lax.axis_index(recipe.data_axis) * size
            rows = jax.tree.map(lambda all_rows: jax.lax.dynamic_slice_in_dim(all_rows, first, size), (index, draws))
        if recipe.accumulate == 1:
            sums, statistics = piece(*rows)
        else:
            pieces = jax.tree.map(lambda r: r.reshape(recipe.accumulate, -1, *r.shape[1:]), rows)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(piece, *first_of(pieces))[0])
            sums, _ = jax.lax.scan(
                lambda so_far, rows: (jax.tree.map(jnp.add, so_far, piece(*rows)[0]), None), zero, pieces
            )
        if recipe.data_axis is not None:
            sums = jax.lax.psum(sums, recipe.data_axis)  # type: ignore[no-untyped-call]
        gradient, value, correct = sums
        update, optimizer_state = rule.update(gradient, optimizer_state, parameters)
        return (optax.apply_updates(parameters, update), statistics, optimizer_state), (value, correct)

    return step


def first_of(tree: PyTree) -> PyTree:
    """Return the first row of every array in a tree."""
    return jax.tree.map(lambda rows: rows[0], tree)


def own_examples(recipe: Recipe, numbers: LaneNumbers, examples: Examples) -> Int[Array, " own"] | None:
    """Draw the examples that a lane trains on. Return their indices in stored order, or None for all examples."""
    count = examples.y.shape[0]
    if recipe.examples is None or recipe.examples == count:
        return None
    return jnp.sort(jax.random.permutation(keys_of(numbers).subset, count)[: recipe.examples])


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Return whether every number of every leaf is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def over_lanes(function: Callable[..., PyTree], at_a_time: int, lane_arguments: int = 1) -> Callable[..., PyTree]:
    """Map a function of one model over lanes.

    A group of `at_a_time` lanes is vectorised, and the groups run one after another. The first `lane_arguments`
    arguments have a leading lane axis. All lanes share the other arguments.
    """

    def mapped(*arguments: PyTree) -> PyTree:
        lanes, shared = arguments[:lane_arguments], arguments[lane_arguments:]

        def one(lane: tuple[PyTree, ...]) -> PyTree:
            return function(*lane, *shared)

        if at_a_time == 1:  # no vmap over one lane: it would turn matrix products into batches of one
            return jax.lax.map(one, lanes)
        if at_a_time >= jax.tree.leaves(lanes)[0].shape[0]:
            return jax.vmap(one)(lanes)
        return jax.lax.map(one, lanes, batch_size=at_a_time)

    return mapped
