from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from cnnlib.config.fields import from_dict, to_dict
from cnnlib.config.overrides import assignments, override
from cnnlib.config.schema import Arm, Experiment, Lanes, Optim, lane_numbers
from cnnlib.data.declaration import Data
from cnnlib.errors import UserError
from cnnlib.spec.architectures import lenet5, mlp, two_conv

pytestmark = pytest.mark.once

EXPERIMENT = Experiment(arms=(Arm("full", mlp(30)), Arm("lenet5", lenet5())), optim=Optim(learning_rate=(0.1, 0.3)))


def test_overrides_reach_every_kind_of_field():
    changed = override(
        EXPERIMENT,
        [
            "epochs=3",
            "optim.learning_rate=0.1",
            "optim.name=adam",
            "lanes.seed=0..3,7",
            "data.name=fashion_mnist",
            "data.data_dir=/data",
            "augment.flip=true",
            "augment.crop=24",
            "arms.lenet5.model=two_conv",
            "arms=lenet5",
        ],
    )
    assert changed.epochs == 3
    assert changed.optim == Optim("adam", learning_rate=(0.1,))
    assert changed.lanes.seed == (0, 1, 2, 3, 7)
    assert changed.data == Data("fashion_mnist", "/data")
    assert changed.augment.flip and changed.augment.crop == 24
    assert changed.arms == (Arm("lenet5", two_conv()),)
    assert override(changed, ["augment.crop=none"]).augment.crop is None


def test_an_arm_takes_layers_in_short_notation():
    changed = override(EXPERIMENT, ["arms.full.model=dense:7 relu dense:classes"])
    assert changed.arms[0].model == mlp(7)


def test_the_last_of_two_overrides_of_one_field_holds():
    assert override(EXPERIMENT, ["epochs=3", "epochs=5"]).epochs == 5


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("epoch=3", ["no field 'epoch'", "epochs", "optim"]),
        ("optim.lr=1", ["no field 'optim.lr'", "learning_rate"]),
        ("optim=sgd", ["group of fields", "optim.name"]),
        ("epochs.x=3", ["'epochs' holds a value"]),
        ("epochs", ["no override", "FIELD=VALUE"]),
        ("epochs=three", ["whole number"]),
        ("epochs=1.5", ["whole number"]),
        ("epochs=0", ["at least 1"]),
        ("batch_size=0", ["at least 1"]),
        ("optim.learning_rate=fast", ["expected a number"]),
        ("optim.learning_rate=nan", ["must be in"]),
        ("optim.learning_rate=-1", ["must be in"]),
        ("optim.learning_rate=0.1,0.1", ["repeats"]),
        ("optim.momentum=1", ["must be in [0, 1)"]),
        ("optim.name=lion", ["sgd, adam, adamw"]),
        ("augment.flip=yes", ["true or false"]),
        ("augment.shift=-1", ["negative"]),
        ("data.validation=-1", ["negative"]),
        ("lanes.seed=", ["at least one lane"]),
        ("lanes.seed=3..1", ["at least one lane"]),
        ("lanes.seed=0,0", ["repeats"]),
        ("lanes.seed=0..999999999", ["100,000"]),
        ("lanes.seed=0.." + "9" * 5000, ["whole number"]),
        ("lanes.at_a_time=0", ["at least 1"]),
        ("arms=lenet", ["no arm 'lenet'", "full, lenet5"]),
        ("arms.lenet.model=lenet5", ["no arm 'lenet'"]),
        ("arms.lenet5=lenet5", ["arms.lenet5.model"]),
        ("arms.lenet5.name=x", ["there are: model, connectivity, match, start"]),
        ("arms.lenet5.model=resnet", ["no layer 'resnet'", "lenet_300_100"]),
        ("compute_dtype=float16", ["float32, bfloat16"]),
    ],
)
def test_a_wrong_override_is_one_line_that_says_what_exists(assignment, parts):
    with pytest.raises(UserError) as error:
        override(EXPERIMENT, [assignment])
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_configuration_survives_json_and_its_own_assignments():
    assert from_dict(json.loads(json.dumps(to_dict(EXPERIMENT))), Experiment) == EXPERIMENT
    assert override(EXPERIMENT, assignments(EXPERIMENT)) == EXPERIMENT


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"epoch": 3}, "no field config.epoch"),
        ({"epochs": "3"}, "config.epochs: expected int"),
        ({"epochs": True}, "config.epochs: expected int"),
        ({"data": 3}, "config.data: expected an object"),
        ({"arms": []}, "at least one arm"),
    ],
)
def test_a_stranger_s_json_is_checked(change, part):
    with pytest.raises(UserError, match=part):
        from_dict({**to_dict(EXPERIMENT), **change}, Experiment)


def test_a_missing_field_is_named():
    values = to_dict(EXPERIMENT)
    del values["arms"]
    with pytest.raises(UserError, match=r"config\.arms is missing"):
        from_dict(values, Experiment)


def test_a_field_that_came_later_has_its_default():
    values = to_dict(EXPERIMENT)
    del values["optim"]["label_smoothing"], values["reshuffle"], values["arms"][0]["own"]
    assert from_dict(values, Experiment) == EXPERIMENT


def test_lanes_are_the_product_of_traced_numbers_and_seeds():
    lanes = lane_numbers(dataclasses.replace(EXPERIMENT, lanes=Lanes(seed=(0, 1, 2))))
    assert [(lane.learning_rate, lane.seed) for lane in lanes] == [
        (0.1, 0),
        (0.1, 1),
        (0.1, 2),
        (0.3, 0),
        (0.3, 1),
        (0.3, 2),
    ]
    assert len({lane.setting for lane in lanes}) == 2


def test_two_arms_may_not_share_a_name():
    with pytest.raises(UserError, match="share a name"):
        Experiment(arms=(Arm("a", mlp()), Arm("a", mlp(3))))


def test_a_traced_field_must_be_a_tuple():
    # In a process of its own: in this one the type checker of the test session would notice first.
    code = "from cnnlib.config.schema import Optim; Optim(learning_rate=0.1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError: optim.learning_rate must be a tuple" in done.stderr
