"""Linear probes: how well a linear classifier separates the classes, given each layer's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from cnnlib.data.sets import DataSet
from cnnlib.errors import UserError
from cnnlib.interpret.activations import activations
from cnnlib.interpret.trained import Net

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3)
"""L2 penalties to try. Each is multiplied by the sum of squares of the features."""


class Probe(NamedTuple):
    """A linear classifier fitted to a layer's outputs."""

    layer: int | None
    """Position of the layer in the model. None means the normalised pixels of the image."""
    name: str
    features: int
    penalty: float
    """The penalty in `PENALTIES` that has the highest validation accuracy."""
    accuracy: float
    """Share of the test examples that the probe classifies correctly."""


def linear_probes(net: Net, data: DataSet, layers: Sequence[int | None] | None = None) -> list[Probe]:
    """Fit one linear classifier on the outputs of each layer, and measure its accuracy. None stands for the pixels.

    By default, probe the pixels and then every layer. The method follows Alain and Bengio, "Understanding intermediate
    layers using linear classifier probes", 2016. Alain and Bengio use logistic regression. cnnlib uses ridge regression
    (least squares with an L2 penalty, one class against the others), because it has a closed form without randomness.
    Probes are fitted on the same training examples as the net. The penalty with the highest validation accuracy is
    chosen. If several penalties tie, the largest is chosen. Each probe is scored once, on the test examples.

    Raises UserError if there are no validation examples.
    """
    if not len(data.validation.y):
        raise UserError("probes choose their penalty on validation examples: data.validation must be 1 or more")
    wanted = (None, *range(len(net.model.layers))) if layers is None else layers
    inside = [layer for layer in wanted if layer is not None]
    splits = (data.train, data.validation, data.test)
    outputs = [dict(zip(inside, activations(net, split.x, inside), strict=True)) for split in splits]
    labels = [np.asarray(split.y) for split in splits]
    targets = np.eye(data.description.num_classes)[labels[0]]
    probes = []
    # These matrices are small. With several threads, BLAS would lose time if another program uses one of the cores.
    with threadpool_limits(limits=1, user_api="blas"):
        for layer in wanted:
            parts = (
                net.seen(split.x) if layer is None else output[layer]
                for split, output in zip(splits, outputs, strict=True)
            )
            features = [part.reshape(len(part), -1).astype(np.float64) for part in parts]
            best, chosen = -1.0, (0.0, 0.0)
            for penalty, scores in ridge(features[0], targets, PENALTIES[::-1]):
                validation, test = (
                    float((scores(x).argmax(axis=1) == y).mean()) for x, y in zip(features[1:], labels[1:], strict=True)
                )
                if validation > best:
                    best, chosen = validation, (penalty, test)
            name = "input" if layer is None else f"{layer} {net.model.layers[layer]}"
            probes.append(Probe(layer, name, features[0].shape[1], *chosen))
    return probes


def ridge(
    x: Float[np.ndarray, "count feature"], y: Float[np.ndarray, "count target"], penalties: Sequence[float]
) -> Iterator[tuple[float, Callable[[np.ndarray], np.ndarray]]]:
    """Yield one pair per penalty p: p, and the linear function f that minimises |y - f(x)|^2 + p s |weights|^2.

    The penalty does not apply to the intercept. s is the sum of squares of the centred features. It makes the result
    independent of the scale of a layer's outputs. The closed form has one equation per feature or one equation per
    example, whichever gives fewer equations.
    """
    mean, target_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean, y - target_mean
    over_features = x.shape[1] <= x.shape[0]
    gram = x.T @ x if over_features else x @ x.T
    scale = float(np.trace(gram)) or 1.0  # constant features get weights of 0 with any penalty
    right = x.T @ y if over_features else y
    for penalty in penalties:
        solved = np.linalg.solve(gram + penalty * scale * np.eye(len(gram)), right)
        weights = solved if over_features else x.T @ solved
        yield penalty, partial(_affine, weights, target_mean - mean @ weights)


def _affine(weights: np.ndarray, intercept: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(x @ weights + intercept)
