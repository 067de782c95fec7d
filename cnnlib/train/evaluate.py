"""Evaluate trained models. Each function handles one model; `step.over_lanes` maps it over all lanes (models)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cnnlib.config.schema import LaneNumbers
from cnnlib.nn.equivalence import project
from cnnlib.nn.network import Parameters, Statistics, logits
from cnnlib.spec.model import Model
from cnnlib.train.augment import central, normalize
from cnnlib.train.step import own_examples
from cnnlib.train.types import Answers, Examples, Recipe, Sums


def predict(recipe: Recipe, batch_size: int = 500) -> Callable[[Parameters, Statistics, Examples], Answers]:
    """Return a function that predicts every example: `answer(parameters, statistics, examples) -> answers`.

    Norm layers use their running statistics. Copies of the last example fill up the last batch. The answers to these
    copies are dropped.
    """

    answer_at = answers_at(recipe)

    def answer(parameters: Parameters, statistics: Statistics, examples: Examples) -> Answers:
        count = examples.y.shape[0]
        size = min(batch_size, count)
        rounds = -(-count // (size * recipe.shards))  # devices that share training batches share test batches
        positions = jnp.minimum(jnp.arange(rounds * recipe.shards * size), count - 1).reshape(-1, rounds, size)
        own = positions[shard_of(recipe)]

        def step(_: None, index: Int[Array, " batch"]) -> tuple[None, Answers]:
            return None, answer_at(parameters, statistics, examples, index)

        _, batches = jax.lax.scan(step, None, own)
        if recipe.data_axis is not None:
            batches = jax.lax.all_gather(batches, recipe.data_axis)
        return Answers(*(batch.reshape(-1)[:count] for batch in batches))

    return answer


def answers_at(recipe: Recipe) -> Callable[[Parameters, Statistics, Examples, Int[Array, " batch"]], Answers]:
    """Return a function that predicts some examples: `answer(parameters, statistics, examples, index) -> answers`.

    `index` holds the positions of these examples.
    """

    def answer(
        parameters: Parameters, statistics: Statistics, examples: Examples, index: Int[Array, " batch"]
    ) -> Answers:
        x = normalize(central(examples.x[index], recipe.augment), examples.mean, examples.deviation)
        output = logits(recipe.network, parameters, statistics, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(output, examples.y[index])
        return Answers(output.argmax(-1), losses)

    return answer


def shard_of(recipe: Recipe) -> int | Int[Array, ""]:
    """Return the index of this device among the devices that share a batch."""
    return 0 if recipe.data_axis is None else jax.lax.axis_index(recipe.data_axis)


def evaluate(recipe: Recipe, batch_size: int = 500) -> Callable[[Parameters, Statistics, Examples], Sums]:
    """Return a function that evaluates a model on every example: `test(parameters, statistics, examples) -> sums`.

    The loss has no label smoothing.
    """
    answer = predict(recipe, batch_size)

    def test(parameters: Parameters, statistics: Statistics, examples: Examples) -> Sums:
        answers = answer(parameters, statistics, examples)
        correct = (answers.predicted == examples.y).sum()
        return Sums(answers.loss.sum(), correct, jnp.asarray(examples.y.shape[0], jnp.int32))

    return test


def evaluate_first(
    recipe: Recipe, batch_size: int = 500
) -> Callable[[Parameters, Statistics, Examples, Int[Array, ""]], Sums]:
    """Return a function that evaluates a model on the first `count` examples.

    The function is `test(parameters, statistics, examples, count) -> sums`. Its time depends on `count`, not on the
    size of `examples`.
    """
    answer_at = answers_at(recipe)

    def test(parameters: Parameters, statistics: Statistics, examples: Examples, count: Int[Array, ""]) -> Sums:
        size = min(batch_size, examples.y.shape[0])
        at_once = size * recipe.shards

        def next_batch(number: Int[Array, ""], so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            positions = number * at_once + shard_of(recipe) * size + jnp.arange(size)
            index = jnp.minimum(positions, examples.y.shape[0] - 1)
            predicted, loss = answer_at(parameters, statistics, examples, index)
            counts = positions < count
            correct = ((predicted == examples.y[index]) & counts).sum()
            return so_far[0] + jnp.where(counts, loss, 0.0).sum(), so_far[1] + correct

        nothing = (jnp.zeros(()), jnp.zeros((), jnp.int32))
        sums = jax.lax.fori_loop(0, (count + at_once - 1) // at_once, next_batch, nothing)
        if recipe.data_axis is not None:
            sums = jax.lax.psum(sums, recipe.data_axis)  # type: ignore[no-untyped-call]
        loss, correct = sums
        return Sums(loss, correct, jnp.asarray(count))

    return test


def distance_from_conv(recipe: Recipe) -> Callable[[Parameters], Float[Array, ""]]:
    """Return a function that measures how far a local or full net is from a convolution: `distance(parameters)`.

    The distance is the norm of (weights minus nearest convolution), divided by the norm of the weights. It is 0 for a
    convolution, and 1 if the nearest convolution is zero (`equivalence.project`).
    """
    model = Model(recipe.network.layers)
    return lambda parameters: project(model, parameters, recipe.input_shape, "conv").total


def fit(recipe: Recipe, batch_size: int = 500) -> Callable[[Parameters, Statistics, LaneNumbers, Examples], Sums]:
    """Return a function to evaluate a model on its training set: `known(parameters, statistics, numbers, examples)`."""
    test = evaluate(recipe, batch_size)

    def known(parameters: Parameters, statistics: Statistics, numbers: LaneNumbers, examples: Examples) -> Sums:
        if (own := own_examples(recipe, numbers, examples)) is not None:
            examples = examples._replace(x=examples.x[own], y=examples.y[own])
        return test(parameters, statistics, examples)

    return known
