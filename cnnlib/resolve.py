"""An experiment meets its data: classes known, budgets matched, every layer known to fit, counts exact; without JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnlib.architectures import ARCHITECTURES
from cnnlib.budget import Match, match
from cnnlib.config import Arm, Experiment, Optim
from cnnlib.cost import Count, count, layers
from cnnlib.data import Description
from cnnlib.errors import UserError
from cnnlib.spec import READINGS, Connectivity, Dense, Model, Norm, Shape, parse_model, shape_text


@dataclass(frozen=True)
class ResolvedArm:
    """An arm on the data at hand: its number of classes known, every layer known to fit, its counts exact."""

    name: str
    model: Model
    input_shape: Shape
    count: Count
    match: Match | None = None
    """How its widths came about; None: as the arm has them."""
    start: Connectivity | None = None


def resolve(experiment: Experiment, description: Description) -> tuple[ResolvedArm, ...]:
    """The arms on a data set; raises UserError for a layer that does not fit, a budget out of reach, or a batch larger
    than the data."""
    check_optim(experiment.optim)
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
    arms = resolve_arms(experiment.arms, input_shape, description.num_classes)
    for arm in arms:
        check_norms(arm, experiment.batch_size)
        output_shape = arm.model.shapes(input_shape)[-1]
        if output_shape != (description.num_classes,):
            raise UserError(
                f"arm {arm.name}: its output is {shape_text(output_shape)}, "
                f"{description.name} has {description.num_classes} classes"
            )
    return arms


def check_optim(optim: Optim) -> None:
    """Raises UserError for a number that would do nothing."""
    if any(optim.l1_threshold) and not any(optim.l1):
        raise UserError("optim.l1_threshold is a multiple of optim.l1, which is 0: it would do nothing")


def check_norms(arm: ResolvedArm, batch_size: int) -> None:
    """Raises UserError for a norm whose mean would be over one value."""
    for layer in layers(arm.model, arm.input_shape):
        if layer.layer == Norm() and batch_size * math.prod(layer.input_shape[:-1]) == 1:
            raise UserError(
                f"arm {arm.name}: batch_size=1 leaves the norm of {shape_text(layer.input_shape)} one value a channel, "
                "which it makes zero; it needs at least 2"
            )


def resolve_arms(arms: tuple[Arm, ...], input_shape: Shape, num_classes: int) -> tuple[ResolvedArm, ...]:
    """The arms on inputs of a shape, widths matched; raises UserError for what does not fit or cannot be matched."""
    by_name = {arm.name: arm for arm in arms}
    done: dict[str, ResolvedArm] = {}

    def resolved(arm: Arm, waiting: tuple[str, ...]) -> ResolvedArm:
        if arm.name in done:
            return done[arm.name]
        if arm.name in waiting:
            raise UserError(f"arm {arm.name}: matched in a circle: {' to '.join((*waiting, arm.name))}")
        model, matched = arm.reading.with_num_classes(num_classes), None
        target = None if arm.match is None else budget(arm.match, (*waiting, arm.name))
        try:
            check_readings(arm, model)
            model.shapes(input_shape)
            if arm.match is not None and not isinstance(model.layers[-1], Dense) and arm.model.has_classes:
                raise UserError(f"match={arm.match}: the classes of {arm.model} are not its last layer, and no width")
            if arm.match is not None and target is not None:
                matched = match(model, target, arm.match.partition(":")[0], input_shape)
                model = matched.model
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None
        done[arm.name] = ResolvedArm(arm.name, model, input_shape, count(model, input_shape), matched, arm.start)
        return done[arm.name]

    def budget(wanted: str, waiting: tuple[str, ...]) -> int:
        """What there is of a measure in a reference: the number itself, or that of an arm, an architecture, layers."""
        by, _, reference = wanted.partition(":")
        if reference.isascii() and reference.isdigit() and len(reference) <= 30:
            return int(reference)
        # An arm may be matched to the architecture whose name it has.
        if reference in by_name and not (reference == waiting[-1] and reference in ARCHITECTURES):
            found = resolved(by_name[reference], waiting).count
        else:
            if reference in ARCHITECTURES:
                model = ARCHITECTURES.get(reference)
            else:
                try:
                    model = parse_model(reference)
                except UserError as error:
                    raise UserError(
                        f"arm {waiting[-1]}: match={wanted}: no number, arm ({', '.join(by_name)}) or "
                        f"architecture ({', '.join(ARCHITECTURES)}), and {error}"
                    ) from None
            try:
                found = count(model.with_num_classes(num_classes), input_shape)
            except UserError as error:
                raise UserError(f"arm {waiting[-1]}: match={wanted}: {error}") from None
        value: int = getattr(found, by)
        return value

    return tuple(resolved(arm, ()) for arm in arms)


def check_readings(arm: Arm, model: Model) -> None:
    """Raises UserError where the arm's connectivity or start cannot be had from its layers."""
    if arm.connectivity is not None and model.connectivity != arm.connectivity:
        raise UserError(f"connectivity={arm.connectivity}: no layer of {model} has a window to be read so")
    if arm.start is not None:
        own = model.connectivity
        if model != model.with_connectivity(own):
            raise UserError(f"start={arm.start}: the layers of {model} differ in connectivity")
        if READINGS.index(arm.start) > READINGS.index(own):
            able = ", ".join(READINGS[: READINGS.index(own) + 1])
            raise UserError(f"start={arm.start}: a {own} net has no weights for that; it can start as: {able}")
