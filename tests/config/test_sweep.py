"""Sweeps as data, and the arms and lanes that come of them."""

from __future__ import annotations

import dataclasses

import pytest

from cnnlib.config.fields import from_dict, to_dict
from cnnlib.config.overrides import assignments, override
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Arm, Experiment, Lanes, Optim, lane_numbers
from cnnlib.config.sweep import points, product, zipped
from cnnlib.data.declaration import Data
from cnnlib.errors import UserError
from cnnlib.spec.notation import parse_model

pytestmark = pytest.mark.once

NET = parse_model("dense:4 relu dense:classes")
OWN = Arm("own", NET, own=("data.train=300", "augment.shift=2", "optim.learning_rate=0.5"))
EXPERIMENT = Experiment(arms=(Arm("plain", NET), OWN), data=Data("lines"), batch_size=100)


def named(side, depth):
    return Arm(f"{side}_{depth}", NET)


def test_factors_multiply_or_go_together_and_are_filtered():
    names = [arm.name for arm in points(product(side=(1, 2), depth=(3, 4)), named)]
    assert names == ["1_3", "1_4", "2_3", "2_4"]
    assert [arm.name for arm in points(zipped(side=(1, 2), depth=(3, 4)), named)] == ["1_3", "2_4"]
    few = points(product(side=(1, 2), depth=(3, 4)), named, where=lambda side, depth: side + depth == 5)
    assert [arm.name for arm in few] == ["1_4", "2_3"]
    listed = [*zipped(side=(7,), depth=(7,)), {"side": 8, "depth": 9}]
    assert [arm.name for arm in points(listed, named)] == ["7_7", "8_9"]
    with pytest.raises(ValueError, match="shorter"):
        zipped(side=(1, 2), depth=(3,))


def test_traced_fields_multiply_or_go_together():
    optim = Optim(learning_rate=(0.1, 0.2), weight_decay=(0.0, 0.5), momentum=(0.9,))
    both = dataclasses.replace(EXPERIMENT, optim=optim, lanes=Lanes(seed=(7,)))
    assert [numbers[2:5] for numbers in lane_numbers(both)] == [
        (0.1, 0.9, 0.0),
        (0.1, 0.9, 0.5),
        (0.2, 0.9, 0.0),
        (0.2, 0.9, 0.5),
    ]
    pairs = lane_numbers(dataclasses.replace(both, lanes=Lanes(seed=(7,), combine="zip")))
    assert [numbers[2:5] for numbers in pairs] == [(0.1, 0.9, 0.0), (0.2, 0.9, 0.5)]
    three = dataclasses.replace(optim, momentum=(0.1, 0.2, 0.3))
    with pytest.raises(
        UserError, match=r"lanes\.combine=zip needs fields of one value or of equally many, not of 2 and 3"
    ):
        dataclasses.replace(both, optim=three, lanes=Lanes(combine="zip"))


def test_seeds_of_weights_and_of_order_are_crossed():
    crossed = dataclasses.replace(EXPERIMENT, lanes=Lanes(seed=(0, 1), order_seed=(5, 6, 7)))
    assert [numbers[:2] for numbers in lane_numbers(crossed)] == [(0, 5), (0, 6), (0, 7), (1, 5), (1, 6), (1, 7)]
    assert [numbers[:2] for numbers in lane_numbers(EXPERIMENT)] == [(seed, seed) for seed in range(5)]


def test_an_arm_has_fields_of_its_own():
    plain, own = resolve(EXPERIMENT)
    assert (plain.steps, own.steps) == (40 * 10, 3 * 10)
    assert own.description.counts["train"] == 300 and plain.description.counts["train"] == 4000
    assert own.experiment.augment.shift == 2 and plain.experiment.augment.shift == 0
    assert [numbers.learning_rate for numbers in own.lanes] == [0.5] * 5
    assert own.data == plain.data  # both train on parts of one set, which is loaded once
    assert own.program != plain.program


def test_arms_that_differ_in_traced_numbers_share_a_program():
    arms = (Arm("slow", NET), Arm("fast", NET, own=("optim.learning_rate=0.5",)))
    slow, fast = resolve(dataclasses.replace(EXPERIMENT, arms=arms))
    assert slow.program == fast.program and slow.lanes != fast.lanes


def test_own_fields_are_set_by_overrides_and_read_back():
    changed = override(EXPERIMENT, ["arms.plain.epochs=3", "arms.own.data.train=200", "arms.own.epochs=5"])
    assert changed.arms[0].own == ("epochs=3",)
    assert changed.arms[1].own == ("augment.shift=2", "optim.learning_rate=0.5", "data.train=200", "epochs=5")
    assert override(EXPERIMENT, assignments(changed)) == changed
    assert from_dict(to_dict(changed), Experiment) == changed


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("arms.plain.epochs=0", "arm plain: epochs must be at least 1"),
        ("arms.plain.data.trains=5", "arm plain: no field 'data.trains'"),
        ("arms.plain.optim.learning_rate=fast", "arm plain: optim.learning_rate=fast: expected a number"),
        ("arms.plain.checkpoint.every=1", "no field 'arms.plain.checkpoint.every'"),
        ("arms.plain.own=epochs=1", "no field 'arms.plain.own'"),
    ],
)
def test_what_an_arm_cannot_have_is_said(assignment, part):
    with pytest.raises(UserError, match=part):
        override(EXPERIMENT, [assignment])


def test_more_examples_than_there_are_cannot_be_trained_on():
    with pytest.raises(UserError, match=r"data\.train=4001 is more than lines has to train on: 4000"):
        resolve(override(EXPERIMENT, ["arms.plain.data.train=4001"]))


def test_what_is_compared_follows_the_arms():
    compared = dataclasses.replace(EXPERIMENT, comparisons=("plain:own",))
    assert override(compared, ["arms=plain"]).comparisons == ()
    assert override(compared, ["arms=own,plain"]).comparisons == ("plain:own",)
    assert override(EXPERIMENT, ["comparisons=own:plain"]).comparisons == ("own:plain",)
    for wrong in ("own", "own:own", "own:other"):
        with pytest.raises(UserError, match=f"{wrong} is no pair FIRST:SECOND of arms; there are: plain, own"):
            override(EXPERIMENT, [f"comparisons={wrong}"])
