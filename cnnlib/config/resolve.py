"""Combine an experiment with its data sets, without JAX.

Resolving sets the number of classes, matches budgets, checks that layers fit, and counts them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cnnlib.config.schema import Arm, Experiment, LaneNumbers, Optim, lane_numbers
from cnnlib.data.declaration import Data
from cnnlib.data.sets import Description, describe
from cnnlib.errors import UserError
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.spec.budget import Match, match
from cnnlib.spec.counts import Count, count, layers
from cnnlib.spec.layers import READINGS, Connectivity, Dense, Norm
from cnnlib.spec.model import Model
from cnnlib.spec.notation import parse_model
from cnnlib.spec.window import Shape, shape_text


@dataclass(frozen=True)
class ResolvedArm:
    """An arm for a known input shape. Its number of classes is set, every layer fits, and the counts are exact."""

    name: str
    model: Model
    input_shape: Shape
    count: Count
    match: Match | None = None
    """How the widths were scaled to a budget. None: they were not scaled."""
    start: Connectivity | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedArm(ResolvedArm):
    """A resolved arm, its data set, and everything else that training needs."""

    experiment: Experiment
    """The experiment with this arm only. The overrides in the arm's `own` field are applied."""
    description: Description

    @property
    def lanes(self) -> tuple[LaneNumbers, ...]:
        """Return the hyperparameters of each lane (model)."""
        return lane_numbers(self.experiment)

    @property
    def steps(self) -> int:
        """Return the total number of training steps per lane; 0 if the data set is not prepared yet."""
        one = self.experiment
        return self.description.counts.get("train", 0) // one.batch_size * one.passes * one.epochs

    @property
    def data(self) -> Data:
        """Return the data set to load. Its `train` is None: arms that train on other subsets share the whole set."""
        return replace(self.experiment.data, train=None)

    @property
    def program(self) -> Hashable:
        """Return the key of the compiled program. Arms with equal keys differ only in traced hyperparameters."""
        one, optim = self.experiment, self.experiment.optim
        rule = (optim.name, optim.schedule, any(optim.l1))
        sizes = (
            one.batch_size,
            one.epochs,
            one.data.train,
            len(self.lanes),
            one.lanes.at_a_time,
            one.devices,
            one.mesh,
        )
        return (
            self.model,
            self.start,
            self.input_shape,
            self.data,
            one.augment,
            rule,
            sizes,
            one.reshuffle,
            one.passes,
            one.accumulate,
            one.remat,
            one.compute_dtype,
            one.precision,
        )


class Part(NamedTuple):
    """The part of an experiment that one job trains: a whole arm, or only its lanes (models) for a block of seeds."""

    arm: str
    block: tuple[int, int] | None = None
    """First and last seed, both included, in the order of `lanes.seed`. None: all lanes of the arm."""

    @classmethod
    def named(cls, text: str) -> Part:
        """Parse `lenet5` (all lanes) or `lenet5-0..4` (lanes of seeds 0 to 4). Raise UserError for any other form."""
        found = re.fullmatch(r"([^.]+?)(?:-(\d+)\.\.(\d+))?", text)
        if found is None:
            raise UserError(f"part {text!r} must be ARM or ARM-FIRST..LAST, such as lenet5-0..4")
        arm, first, last = found.groups()
        return cls(arm, None if first is None else (int(first), int(last)))

    def __str__(self) -> str:
        return self.arm if self.block is None else f"{self.arm}-{self.block[0]}..{self.block[1]}"

    def of(self, arms: Sequence[TrainedArm]) -> tuple[TrainedArm, ...]:
        """Return this part's arm with only this part's lanes. Raise UserError if the arm or a seed does not exist."""
        for arm in arms:
            if arm.name == self.arm:
                if self.block is None:
                    return (arm,)
                lanes = arm.experiment.lanes
                if unknown := set(self.block) - set(lanes.seed):
                    raise UserError(f"arm {arm.name} has no lanes of seed {', '.join(map(str, sorted(unknown)))}")
                first, last = map(lanes.seed.index, self.block)
                own = replace(lanes, seed=lanes.seed[first : last + 1])
                return (replace(arm, experiment=replace(arm.experiment, lanes=own)),)
        raise UserError(f"no arm {self.arm!r}; there are: {', '.join(arm.name for arm in arms)}")


def resolve(experiment: Experiment, described: Callable[[Data], Description] = describe) -> tuple[TrainedArm, ...]:
    """Resolve every arm on its data set. The function `described` returns the description of a data set.

    Raise UserError if a layer does not fit, a budget cannot be reached, or a batch is larger than the data.
    """
    own = {arm.name: experiment.of_arm(arm) for arm in experiment.arms}
    descriptions = {data: described(data) for data in dict.fromkeys(one.data for one in own.values())}
    inputs = {}
    for name, one in own.items():
        description = descriptions[one.data]
        check_optim(one.optim)
        check_sizes(one, description)
        inputs[name] = (one.augment.seen_shape(description.input_shape), description.num_classes)
    arms = []
    for arm in resolve_arms(experiment.arms, inputs):
        one, description = own[arm.name], descriptions[own[arm.name].data]
        check_norms(arm, one.batch_size, one.accumulate)
        output_shape = arm.model.shapes(arm.input_shape)[-1]
        if output_shape != (description.num_classes,):
            raise UserError(
                f"arm {arm.name}: its output is {shape_text(output_shape)}, "
                f"{description.name} has {description.num_classes} classes"
            )
        arms.append(TrainedArm(**vars(arm), experiment=one, description=description))
    return tuple(arms)


def check_sizes(experiment: Experiment, description: Description) -> None:
    """Raise UserError if a batch is larger than the training data, or if there are 2**31 steps or more."""
    available = description.counts.get("train")
    if available is not None and experiment.batch_size > available:
        raise UserError(
            f"batch_size={experiment.batch_size} is larger than the training data: {description.name} has {available}"
        )
    if available is not None and available // experiment.batch_size * experiment.passes * experiment.epochs >= 2**31:
        raise UserError(
            f"epochs={experiment.epochs} are 2**31 steps or more: {description.name} has {available} examples"
        )


def check_optim(optim: Optim) -> None:
    """Raise UserError if `l1_threshold` is set but `l1` is 0: the threshold would have no effect."""
    if any(optim.l1_threshold) and not any(optim.l1):
        raise UserError("optim.l1_threshold is a multiple of optim.l1, which is 0: it would do nothing")


def check_norms(arm: ResolvedArm, batch_size: int, accumulate: int) -> None:
    """Raise UserError if a norm would average over only one value, or over only a part of a batch."""
    for layer in layers(arm.model, arm.input_shape):
        if layer.layer == Norm() and batch_size * math.prod(layer.input_shape[:-1]) == 1:
            raise UserError(
                f"arm {arm.name}: batch_size=1 leaves the norm of {shape_text(layer.input_shape)} one value a channel, "
                "which it makes zero; it needs at least 2"
            )
        if layer.layer == Norm() and accumulate > 1:
            raise UserError(
                f"arm {arm.name}: accumulate={accumulate} with norms: their statistics are those of a whole batch; "
                "remat=true or a smaller batch_size take less memory, too"
            )


def resolve_arms(arms: tuple[Arm, ...], inputs: Mapping[str, tuple[Shape, int]]) -> tuple[ResolvedArm, ...]:
    """Resolve arms and match their widths. `inputs` maps an arm's name to its input shape and number of classes.

    Raise UserError if a layer does not fit its input, or if a budget cannot be matched.
    """
    by_name = {arm.name: arm for arm in arms}
    done: dict[str, ResolvedArm] = {}

    def resolved(arm: Arm, waiting: tuple[str, ...]) -> ResolvedArm:
        if arm.name in done:
            return done[arm.name]
        if arm.name in waiting:
            raise UserError(f"arm {arm.name}: matched in a circle: {' to '.join((*waiting, arm.name))}")
        input_shape, num_classes = inputs[arm.name]
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
        """Return the budget that `wanted` sets: a number, or the count of the arm, architecture or layers it names."""
        by, _, reference = wanted.partition(":")
        input_shape, num_classes = inputs[waiting[-1]]
        if reference.isascii() and reference.isdigit() and len(reference) <= 30:
            return int(reference)
        # If an arm is matched to its own name, the name means the architecture.
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
    """Raise UserError if the arm's layers do not allow its `connectivity` or `start`."""
    if arm.connectivity is not None and model.connectivity != arm.connectivity:
        raise UserError(f"connectivity={arm.connectivity}: no layer of {model} has a window to be read so")
    if arm.start is not None:
        own = model.connectivity
        if model != model.with_connectivity(own):
            raise UserError(f"start={arm.start}: the layers of {model} differ in connectivity")
        if READINGS.index(arm.start) > READINGS.index(own):
            able = ", ".join(READINGS[: READINGS.index(own) + 1])
            raise UserError(f"start={arm.start}: a {own} net has no weights for that; it can start as: {able}")
