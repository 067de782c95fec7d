"""Define the tuples that training uses: a model's state and keys, the examples, the sums, and a program's recipe."""

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
    """One stored split, on the device. `mean` and `deviation` describe the channels of the training split."""

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
    """The answers of one model. For each example, they give the predicted class and the loss."""

    predicted: Int[Array, " count"]
    loss: Float[Array, " count"]


class Keys(NamedTuple):
    """The random keys of one model. Each key serves one kind of random choice during training."""

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
    """Number of examples that a model trains on. The model's order seed selects them. None: all examples."""
    reshuffle: bool = True
    passes: int = 1
    accumulate: int = 1
    """Each batch is cut into this number of equal pieces, which run in turn. Networks with norms must have 1."""
    shards: int = 1
    """Number of devices that share each batch. They lie along the mesh axis `data_axis`."""
    data_axis: str | None = None
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them (`nn.network.training_logits`)."""
    start: Network | None = None
    """A network of another connectivity, which draws the initial weights. None: `network` draws its own weights."""
