"""Arms on an input: read, matched to one another, and what cannot be."""

from __future__ import annotations

import pytest

from cnnlib.config.fields import from_dict, to_dict
from cnnlib.config.overrides import assignments, override
from cnnlib.config.resolve import resolve, resolve_arms
from cnnlib.config.schema import Arm, Experiment, Optim
from cnnlib.data.declaration import Data
from cnnlib.errors import UserError
from cnnlib.spec.architectures import lenet5, lenet_300_100
from cnnlib.spec.counts import count
from cnnlib.spec.notation import parse_model

pytestmark = pytest.mark.once

DIGITS = (28, 28, 1)


def resolved(*arms):
    return {arm.name: arm for arm in resolve_arms(arms, {arm.name: (DIGITS, 10) for arm in arms})}


def test_an_arm_may_be_read_another_way():
    arms = resolved(*(Arm(reading, lenet5(), reading) for reading in ("conv", "local", "full")))
    assert [arm.model.connectivity for arm in arms.values()] == ["conv", "local", "full"]
    shapes = {arm.model.shapes(DIGITS) for arm in arms.values()}
    assert len(shapes) == 1  # the same nodes in every layer


def test_a_reading_can_be_taken_back():
    model = parse_model("conv:3@3/2:1:d1:nobias relu residual(conv:3@3|conv:3@1) max:2 dense:4")
    assert model.full().local().conv() == model
    assert {type(layer).__name__ for layer in model.full().layers} == {
        "Full",
        "Activation",
        "Residual",
        "MaxPool",
        "Dense",
    }
    assert str(model.local()) == "local:3@3/2:1:nobias relu residual(local:3@3|local:3@1) max:2 dense:4"


@pytest.mark.parametrize("reference", ["61706", "lenet5", "other", str(lenet5())])
def test_a_budget_is_a_number_an_arm_an_architecture_or_layers(reference):
    arms = resolved(Arm("arm", lenet_300_100(), match=f"parameters:{reference}"), Arm("other", lenet5()))
    assert arms["arm"].match.target == 61_706
    assert arms["arm"].count.parameters == arms["arm"].match.value == 61_845
    assert arms["other"].match is None


def test_an_arm_of_an_architectures_name_may_be_matched_to_that_architecture():
    (arm,) = resolved(Arm("lenet5", lenet_300_100(), match="macs:lenet5")).values()
    assert arm.match.target == 416_520


def test_arms_are_matched_one_after_another():
    arms = resolved(
        Arm("a", lenet5(), match="parameters:b"),
        Arm("b", lenet5(), "local", match="parameters:c"),
        Arm("c", lenet_300_100()),
    )
    assert arms["b"].match.target == arms["c"].count.parameters
    assert arms["a"].match.target == arms["b"].count.parameters


def test_an_arm_that_is_kept_keeps_the_budget_of_one_that_goes():
    experiment = Experiment(
        (
            Arm("wide", lenet5(), "full"),
            Arm("matched", lenet5(), match="macs:wide"),
            Arm("again", lenet5(), match="macs:matched"),
        )
    )
    kept = override(experiment, ["arms=matched"])
    (arm,) = resolve_arms(kept.arms, {arm.name: (DIGITS, 10) for arm in kept.arms})
    assert arm.match.target == count(lenet5().full().with_num_classes(10), DIGITS).macs
    for each in (experiment, kept):
        assert from_dict(to_dict(each), Experiment) == each and override(each, assignments(each)) == each
    with pytest.raises(
        UserError, match="arm again is matched to matched, which is matched itself: keep matched as well"
    ):
        override(experiment, ["arms=again"])


@pytest.mark.parametrize(
    ("arms", "part"),
    [
        ((Arm("a", lenet5(), match="macs:b"), Arm("b", lenet5(), match="macs:a")), "matched in a circle: a to b to a"),
        ((Arm("a", lenet5(), match="macs:a"),), "matched in a circle: a to a"),
        ((Arm("a", lenet_300_100(), "local"),), "connectivity=local: no layer of dense:300"),
        ((Arm("a", lenet5(), match="macs:nobody"),), "arm a: match=macs:nobody: no number, arm (a) or architecture"),
        ((Arm("a", lenet5(), match="macs:conv:1@99"),), "arm a: match=macs:conv:1@99: layer 0"),
        ((Arm("a", lenet5(), "full", match="parameters:lenet5"),), "arm a: 61,706 parameters cannot be reached"),
        ((Arm("a", lenet5(), start="full"),), "start=full: a conv net has no weights for that"),
        ((Arm("a", lenet5(), "local", start="full"),), "start=full: a local net has no weights"),
        ((Arm("a", parse_model("conv:1@3 local:1@3"), start="conv"),), "differ in connectivity"),
    ],
)
def test_what_cannot_be_is_a_user_error_that_names_its_arm(arms, part):
    with pytest.raises(UserError) as error:
        resolve_arms(arms, {arm.name: (DIGITS, 10) for arm in arms})
    assert part in str(error.value) and str(error.value).startswith("arm ")


@pytest.mark.parametrize("match", ["lenet5", "flops:lenet5", "macs:", "macs: ", ":5"])
def test_a_budget_needs_a_measure_and_a_reference(match):
    with pytest.raises(UserError, match="is no MEASURE:REFERENCE, such as parameters:lenet5; measures are: parameters"):
        Arm("a", lenet5(), match=match)


def test_a_threshold_without_a_penalty_is_refused():
    with pytest.raises(UserError, match=r"optim\.l1_threshold is a multiple of optim\.l1, which is 0"):
        resolve(Experiment((Arm("a", lenet5()),), Data("lines"), optim=Optim(l1_threshold=(50.0,))))
    both = Optim(l1=(0.0, 1e-5), l1_threshold=(50.0,))
    assert resolve(Experiment((Arm("a", lenet5()),), Data("lines"), optim=both))


def test_a_norm_over_one_value_is_refused():
    for text, fits in (("dense:4 norm dense:classes", False), ("norm dense:classes", True)):
        experiment = Experiment((Arm("a", parse_model(text)),), Data("lines"), batch_size=1)
        if fits:
            assert resolve(experiment)
            continue
        with pytest.raises(UserError, match="batch_size=1 leaves the norm of 4 one value a channel"):
            resolve(experiment)
