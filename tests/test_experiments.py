from __future__ import annotations

import inspect
import re

import pytest

from cnnlib.cli.declarations import lab_note
from cnnlib.config.fields import from_dict, to_dict
from cnnlib.config.overrides import assignments, override
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import EXPERIMENTS, Growth
from cnnlib.report.growth import resolve_growth

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
    assert f"cnnlib run {name}" in note
    for section in SECTIONS:
        assert re.search(rf"\n{section} +\S+", note), f"{section} is empty"
    assert inspect.getmodule(EXPERIMENTS.declaration(name)).__name__ == f"cnnlib.experiments.{name}"
