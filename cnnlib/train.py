"""The heart: one model's training as pure functions of keys and numbers, and the map that makes lanes of them.

Read it top to bottom. What is static (network, training rule, sizes) is closed over; everything else is an argument.
`initialize`, `epoch` and its like for streams, `chunk`, are written for one model, as what evaluation.py tests it with;
`over_lanes` maps any of them over a population, and the caller compiles the result. Examples are drawn, augmented and
normalised inside the program: between two epochs nothing but a few sums leaves the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Num

from cnnlib import primitives
from cnnlib.augment import Draws, changed, drawn, normalize, taken
from cnnlib.config import Augment, LaneNumbers, Optim
from cnnlib.equivalence import expand
from cnnlib.models import Network, Parameters, Statistics, initial, training_logits
from cnnlib.optim import optimizer
from cnnlib.spec import Model, Shape


class State(NamedTuple):
    """Everything of one model that changes from epoch to epoch."""

    parameters: Parameters
    statistics: Statistics
    """What its norms have seen; empty without any."""
    optimizer_state: optax.OptState
    epochs: Int[Array, ""]
    """Epochs finished with a finite loss."""
    diverged: Bool[Array, ""]
    """Once true, the model keeps the parameters and statistics of its last finite epoch."""


class Examples(NamedTuple):
    """One split on the device, as stored, with the statistics of the training part."""

    x: Num[Array, "count ..."]
    y: Int[Array, " count"]
    mean: Float[Array, " channel"]
    deviation: Float[Array, " channel"]


class Sums(NamedTuple):
    """Sums over examples, divided once, at the end, by whoever reports them."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    examples: Int[Array, ""]


class Answers(NamedTuple):
    """What a model says of each example."""

    predicted: Int[Array, " count"]
    loss: Float[Array, " count"]


class Keys(NamedTuple):
    """One key for each use of chance in a model's life."""

    init: Key[Array, ""]
    order: Key[Array, ""]
    augment: Key[Array, ""]
    subset: Key[Array, ""]


class Recipe(NamedTuple):
    """What is static in training one model: a change of any of these is another program."""

    network: Network
    input_shape: Shape
    optim: Optim
    augment: Augment
    batch_size: int
    epochs: int
    examples: int | None = None
    """That one model trains on, drawn by its order seed; None: all there are."""
    reshuffle: bool = True
    passes: int = 1
    accumulate: int = 1
    """Equal pieces of a batch, looked at one after another; more than one only of a network without norms."""
    shards: int = 1
    """Devices that share each batch, along the axis `data_axis` of the mesh that the function is mapped over."""
    data_axis: str | None = None
    remat: bool = False
    """Compute maps again instead of keeping them (`models.training_logits`)."""
    start: Network | None = None
    """The reading of the network that draws the initial weights, where it is another one."""


def keys_of(numbers: LaneNumbers) -> Keys:
    """The keys of a lane: the initial weights from its seed, what is drawn from the data from its order seed.

    threefry by name: its bits do not change under vmap or with JAX's default generator.
    """

    def of(seed: int | Integer[Array, ""]) -> Keys:
        return Keys(*jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(Keys._fields)))

    return of(numbers.order_seed)._replace(init=of(numbers.seed).init)


def initialize(recipe: Recipe) -> Callable[[LaneNumbers], State]:
    """The function that makes an untrained model: `init(numbers) -> State`."""
    model = Model(recipe.network.layers)

    def init(numbers: LaneNumbers) -> State:
        drawn = recipe.start or recipe.network
        # Statistics are a channel's in every reading: they need no map.
        parameters, statistics = initial(drawn, keys_of(numbers).init, recipe.input_shape)
        if recipe.start:
            # Drawn once: a compiler that draws each copy of a weight anew may round some of them differently.
            parameters = jax.lax.optimization_barrier(parameters)  # type: ignore[no-untyped-call]
            parameters = expand(Model(recipe.start.layers), parameters, recipe.input_shape, model.connectivity)
        # Neither the step count nor the numbers shape the optimiser's state.
        optimizer_state = optimizer(recipe.optim, numbers, total_steps=1).init(parameters)
        return State(parameters, statistics, optimizer_state, jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    return init


def epoch(recipe: Recipe) -> Callable[[State, LaneNumbers, Examples], tuple[State, Sums]]:
    """The function that trains a model for one epoch: `train(state, numbers, examples) -> (state, sums)`.

    The order is drawn anew for each pass, or is that in which the examples are stored (`reshuffle`); those that do not
    fill a batch at its end are left out of it. `sums` are those of the training loss and accuracy, on augmented
    examples, while the parameters change.
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
    """Where a chunk of a stream lies in the training."""

    pass_number: Int[Array, ""] | np.int32
    """From the start of the training."""
    number: Int[Array, ""] | np.int32
    """Of the chunk in its pass."""
    first_step: Int[Array, ""] | np.int32
    """From the start of the training."""
    steps: Int[Array, ""] | np.int32
    """That it is good for: what follows in it is filling."""
    ends_epoch: Bool[Array, ""] | np.bool_


def chunk(recipe: Recipe, total_steps: int) -> Callable[[State, LaneNumbers, Examples, Place], tuple[State, Sums]]:
    """The function that trains a model on a chunk of a stream: `train(state, numbers, examples, place)`.

    All models see the same chunks, each in its own order, which is drawn anew for each pass (`reshuffle`). What a
    diverged model keeps is what it had before the chunk.
    """

    def train(state: State, numbers: LaneNumbers, examples: Examples, place: Place) -> tuple[State, Sums]:
        count = examples.y.shape[0]
        order = jnp.arange(count)
        if recipe.reshuffle:
            key = jax.random.fold_in(keys_of(numbers).order, place.pass_number)
            order = jax.random.permutation(jax.random.fold_in(key, place.number), count)
            order = order[jnp.argsort(order >= place.steps * recipe.batch_size, stable=True)]  # filling last
        batches = order.reshape(-1, recipe.batch_size)
        step = one_step(recipe, numbers, examples, total_steps)

        def next_step(number: Int[Array, ""], so_far: Any) -> Any:
            model, loss, correct = so_far
            model, (value, corrects) = step(model, (batches[number], place.first_step + number))
            return model, loss + value, correct + corrects

        model = (state.parameters, state.statistics, state.optimizer_state)
        nothing = (jnp.zeros(()), jnp.zeros((), jnp.int32))
        model, loss, correct = jax.lax.fori_loop(0, place.steps, next_step, (model, *nothing))
        sums = Sums(loss * recipe.batch_size, correct, jnp.asarray(place.steps * recipe.batch_size))
        return after(state, model, sums, epochs=jnp.asarray(place.ends_epoch, jnp.int32)), sums

    return train


def after(state: State, model: tuple[Any, ...], sums: Sums, epochs: int | Int[Array, ""]) -> State:
    """The state with what it has been trained to, or diverged with what it was."""
    parameters, statistics, optimizer_state = model
    # The last step's loss is that of the parameters before it, so these are looked at as well.
    finite = jnp.isfinite(sums.loss) & all_finite((parameters, statistics)) & ~state.diverged
    trained = State(parameters, statistics, optimizer_state, state.epochs + epochs, state.diverged)
    frozen = state._replace(diverged=jnp.ones((), bool))
    kept: State = jax.tree.map(lambda new, old: jnp.where(finite, new, old), trained, frozen)
    return kept


def one_step(
    recipe: Recipe, numbers: LaneNumbers, examples: Examples, total_steps: int
) -> Callable[[Any, tuple[Array, Array]], tuple[Any, tuple[Array, Array]]]:
    """The function that trains a model on one batch: `step(model, (index, number)) -> (model, (loss, correct))`.

    `model` is parameters, statistics and optimiser state, `index` says which examples, `number` counts steps from the
    start of the training. Of a batch that devices share, each takes its rows; `accumulate` pieces of these are looked
    at one after another, and their gradients added up.
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

    def step(model: Any, batch: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        parameters, statistics, optimizer_state = model
        index, number = batch
        key = jax.random.fold_in(key_augment, number)
        # Drawn for all of the batch, whoever looks at which part of it.
        draws = drawn(key, recipe.batch_size, examples.x.shape[1:-1], recipe.augment)

        def piece(index: Array, draws: Draws) -> tuple[Any, Statistics]:
            """Sums over some of the batch's examples."""
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


def first_of(tree: Any) -> Any:
    """The first rows of arrays with a leading axis."""
    return jax.tree.map(lambda rows: rows[0], tree)


def own_examples(recipe: Recipe, numbers: LaneNumbers, examples: Examples) -> Int[Array, " own"] | None:
    """Draw which examples a lane trains on, in the order in which they are stored; None for all of them."""
    count = examples.y.shape[0]
    if recipe.examples is None or recipe.examples == count:
        return None
    return jnp.sort(jax.random.permutation(keys_of(numbers).subset, count)[: recipe.examples])


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of every leaf is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def over_lanes(function: Callable[..., Any], at_a_time: int, lane_arguments: int = 1) -> Callable[..., Any]:
    """Maps a function of one model over a population: `at_a_time` lanes vectorised, the groups one after another.

    The first `lane_arguments` arguments have a leading lane axis, the others are shared by all lanes.
    """

    def mapped(*arguments: Any) -> Any:
        lanes, shared = arguments[:lane_arguments], arguments[lane_arguments:]

        def one(lane: tuple[Any, ...]) -> Any:
            return function(*lane, *shared)

        if at_a_time == 1:  # without a vmap over one lane, whose products would be batches of one
            return jax.lax.map(one, lanes)
        if at_a_time >= jax.tree.leaves(lanes)[0].shape[0]:
            return jax.vmap(one)(lanes)
        return jax.lax.map(one, lanes, batch_size=at_a_time)

    return mapped
