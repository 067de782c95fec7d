"""What training works on: a model's state, examples, sums, keys, and the recipe of a program."""

from __future__ import annotations

from typing import NamedTuple

import optax
from jaxtyping import Array, Bool, Float, Int, Key, Num

from cnnlib.config.schema import Augment, Optim
from cnnlib.nn.network import Network, Parameters, Statistics
from cnnlib.spec.window import Shape


class State(NamedTuple):
    """Everything in one model that changes during training."""

    parameters: Parameters
    statistics: Statistics
    """Running statistics of the norms; empty without norms."""
    optimizer_state: optax.OptState
    epochs: Int[Array, ""]
    """Epochs finished with a finite loss."""
    diverged: Bool[Array, ""]
    """Whether the loss, a parameter or a statistic became non-finite. The model then keeps its last finite state."""


class Examples(NamedTuple):
    """One split on the device, as stored, with the mean and standard deviation of the training split."""

    x: Num[Array, "count ..."]
    y: Int[Array, " count"]
    mean: Float[Array, " channel"]
    deviation: Float[Array, " channel"]


class Sums(NamedTuple):
    """Unnormalised sums over examples; divide by `examples` to report a mean."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    examples: Int[Array, ""]


class Answers(NamedTuple):
    """A model's predicted class and its loss per example."""

    predicted: Int[Array, " count"]
    loss: Float[Array, " count"]


class Keys(NamedTuple):
    """The random keys of one model: one key per kind of random choice in its training."""

    init: Key[Array, ""]
    order: Key[Array, ""]
    augment: Key[Array, ""]
    subset: Key[Array, ""]


class Recipe(NamedTuple):
    """The static settings of one model's training. If any setting changes, a new program is compiled."""

    network: Network
    input_shape: Shape
    optim: Optim
    augment: Augment
    batch_size: int
    epochs: int
    examples: int | None = None
    """Number of examples that a model trains on, selected by the model's order seed; None: all examples."""
    reshuffle: bool = True
    passes: int = 1
    accumulate: int = 1
    """Number of equal pieces of a batch that run one after another. Networks with norms must have 1."""
    shards: int = 1
    """Number of devices that share each batch, along the mesh axis `data_axis`."""
    data_axis: str | None = None
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them (`nn.network.training_logits`)."""
    start: Network | None = None
    """Network of another connectivity, whose initialiser draws the initial weights; None: `network` draws them."""
