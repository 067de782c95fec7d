"""Apply overrides, such as `epochs=3`, to an experiment, and write an experiment as a list of overrides."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from cnnlib.config.fields import path_and_text, replace_field, value_text
from cnnlib.config.schema import OWN_FIELDS, Arm, Experiment, Growth
from cnnlib.errors import UserError

T = TypeVar("T")


ARM_FIELDS = [field.name for field in dataclasses.fields(Arm) if field.name not in ("name", "own")]
"""Fields of an arm that overrides can set directly. `name` is fixed. Overrides of `OWN_FIELDS` go into `own`."""


# An override is one `path=value`. The type of the field decides how the value is parsed.


def override(experiment: T, assignments: Iterable[str]) -> T:
    """Replace fields of an experiment. Examples: `epochs=3`, `optim.learning_rate=0.1,0.3`, `lanes.seed=0..9`.

    `arms=NAME,NAME` keeps only those arms. `arms.NAME.model=MODEL` sets an arm's architecture. MODEL is a registered
    name or short notation. `arms.NAME.connectivity=local` sets its connectivity. Raise UserError for an unknown path, a
    wrong type or a value out of range; the message for an unknown path lists the valid ones.
    """
    for is_of_arm, group in itertools.groupby(assignments, lambda assignment: assignment.startswith("arms.")):
        if is_of_arm and isinstance(experiment, Experiment | Growth):
            # Replace the fields of all arms, then build the experiment once: building it validates all arms together.
            arms = experiment.arms
            for path, text in map(path_and_text, group):
                arms = _replaced_arms(arms, path.split(".")[1:], text, path)
            experiment = dataclasses.replace(experiment, arms=arms)
            continue
        for path, text in map(path_and_text, group):
            experiment = _replaced(experiment, path.split("."), text, path)
    return experiment


def _replaced(experiment: T, keys: list[str], text: str, path: str) -> T:
    if keys[0] != "arms" or not isinstance(experiment, Experiment | Growth):
        return replace_field(experiment, keys, text, path)
    arms = _replaced_arms(experiment.arms, keys[1:], text, path)
    if isinstance(experiment, Experiment):
        return _with_arms(experiment, arms)  # type: ignore[return-value]  # T is Experiment here, mypy does not see it
    return dataclasses.replace(experiment, arms=arms)


def _replaced_arms(arms: tuple[Arm, ...], keys: list[str], text: str, path: str) -> tuple[Arm, ...]:
    by_name = {arm.name: arm for arm in arms}
    wanted = text.split(",") if not keys else [keys[0]]
    for name in wanted:
        if name not in by_name:
            raise UserError(f"{path}: no arm {name!r}; there are: {', '.join(by_name)}")
    if not keys:
        return tuple(_without_arms(by_name[name], by_name, wanted) for name in wanted)
    if len(keys) == 1:
        fields = [f"{path}.{name}" for name in ARM_FIELDS]
        raise UserError(f"{path!r} is an arm; set one of: {', '.join((*fields, *OWN_FIELDS))}")
    if keys[1] in OWN_FIELDS:
        field = ".".join(keys[1:])
        return tuple(
            dataclasses.replace(
                arm, own=(*(one for one in arm.own if one.partition("=")[0] != field), f"{field}={text}")
            )
            if arm.name == keys[0]
            else arm
            for arm in arms
        )
    if keys[1] not in ARM_FIELDS:
        raise UserError(f"no field {path!r}; there are: {', '.join((*ARM_FIELDS, *OWN_FIELDS))}")
    return tuple(replace_field(arm, keys[1:], text, path) if arm.name == keys[0] else arm for arm in arms)


def _with_arms(experiment: Experiment, arms: tuple[Arm, ...]) -> Experiment:
    """Return the experiment with only the arms in `arms`. Comparisons of removed arms are removed too."""
    names = {arm.name for arm in arms}
    left = tuple(pair for pair in experiment.comparisons if set(pair.split(":")) <= names)
    return dataclasses.replace(experiment, arms=arms, comparisons=left)


def _without_arms(arm: Arm, arms: dict[str, Arm], kept: list[str]) -> Arm:
    """Return `arm`. If `match` names a removed arm, replace that name by the removed arm's layers."""
    if arm.match is None:
        return arm
    measure, _, reference = arm.match.partition(":")
    if reference not in arms or reference in kept or reference == arm.name:
        return arm
    gone = arms[reference]
    if gone.match is not None:
        raise UserError(f"arm {arm.name} is matched to {reference}, which is matched itself: keep {reference} as well")
    return dataclasses.replace(arm, match=f"{measure}:{gone.reading}")


def assignments(experiment: Experiment | Growth) -> tuple[str, ...]:
    """Return the whole configuration as overrides, one per field. `override` can apply them again."""

    def of(node: Any, prefix: str) -> Iterator[str]:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if field.name == "arms":
                yield f"arms={','.join(arm.name for arm in value)}"
                for arm in value:
                    yield f"arms.{arm.name}.model={arm.model}"
                    optional = {name: getattr(arm, name) for name in ("connectivity", "match", "start")}
                    yield from (f"arms.{arm.name}.{name}={text}" for name, text in optional.items() if text)
                    yield from (f"arms.{arm.name}.{assignment}" for assignment in arm.own)
            elif dataclasses.is_dataclass(value):
                yield from of(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}={value_text(value)}"

    return tuple(of(experiment, ""))
