from __future__ import annotations

import inspect
import re

import pytest

import experiments  # noqa: F401  # registers every experiment
from cnnlib.config import EXPERIMENTS, Growth, assignments, override
from cnnlib.fields import from_dict, to_dict
from cnnlib.growth import resolve_growth
from cnnlib.resolve import resolve
from experiments.__main__ import lab_note

pytestmark = pytest.mark.once

SECTIONS = ("Question:", "Command:", "Expected:", "Cost:", "Source:")


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_builds_on_its_data(name):
    experiment = EXPERIMENTS.get(name)
    if isinstance(experiment, Growth):
        assert set(resolve_growth(experiment)) == set(experiment.sides)
    else:
        assert len(resolve(experiment)) == len(experiment.arms)
    assert from_dict(to_dict(experiment), type(experiment)) == experiment
    assert override(experiment, assignments(experiment)) == experiment


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_has_a_complete_lab_note(name):
    note = lab_note(name)
    assert note.splitlines()[0].endswith("?") and len(note.splitlines()[0]) <= 120
    positions = [note.find(f"\n{section}") for section in SECTIONS]
    assert -1 not in positions and positions == sorted(positions)
    assert f"python -m experiments run {name}" in note
    for section in SECTIONS:
        assert re.search(rf"\n{section} +\S+", note), f"{section} is empty"
    assert inspect.getmodule(EXPERIMENTS.declaration(name)).__name__ == f"experiments.{name}"
