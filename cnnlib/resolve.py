"""An experiment meets its data: classes known, every layer known to fit, counts exact; without JAX."""

from __future__ import annotations

from dataclasses import dataclass

from cnnlib.config import Experiment
from cnnlib.cost import Count, count
from cnnlib.data import Description
from cnnlib.errors import UserError
from cnnlib.spec import Model, Shape, shape_text


@dataclass(frozen=True)
class ResolvedArm:
    """An arm on the data at hand: its number of classes known, every layer known to fit, its counts exact."""

    name: str
    model: Model
    input_shape: Shape
    count: Count


def resolve(experiment: Experiment, description: Description) -> tuple[ResolvedArm, ...]:
    """The arms on a data set; raises UserError for a layer that does not fit, or a batch larger than the data."""
    available = description.counts.get("train")
    if available is not None and experiment.batch_size > available:
        raise UserError(
            f"batch_size={experiment.batch_size} is larger than the training data: {description.name} has {available}"
        )
    if available is not None and available // experiment.batch_size * experiment.epochs >= 2**31:
        raise UserError(
            f"epochs={experiment.epochs} are 2**31 steps or more: {description.name} has {available} examples"
        )
    input_shape = experiment.augment.seen_shape(description.input_shape)
    arms = []
    for arm in experiment.arms:
        model = arm.model.with_num_classes(description.num_classes)
        try:
            shapes = model.shapes(input_shape)
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None
        if shapes[-1] != (description.num_classes,):
            raise UserError(
                f"arm {arm.name}: its output is {shape_text(shapes[-1])}, "
                f"{description.name} has {description.num_classes} classes"
            )
        arms.append(ResolvedArm(arm.name, model, input_shape, count(model, input_shape)))
    return tuple(arms)
