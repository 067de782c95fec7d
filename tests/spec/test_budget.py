"""Budgets: matched exactly where a rounding can, else the nearest that exhaustive search finds."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnlib.errors import UserError
from cnnlib.spec.architectures import lenet5, lenet_300_100, logistic
from cnnlib.spec.budget import MEASURES, match, scaled, widths
from cnnlib.spec.counts import count
from cnnlib.spec.layers import Dense
from cnnlib.spec.model import Model
from cnnlib.spec.notation import parse_model

pytestmark = pytest.mark.once

DIGITS = (28, 28, 1)


def classified(model):
    return model.with_num_classes(10)


def test_widths_are_features_and_hidden_units_and_not_the_outputs():
    assert widths(classified(lenet5())) == (6, 16, 84, 120)
    assert widths(parse_model("residual(conv:4@3|conv:4@1) dense:7 dense:7")) == (4, 7)
    assert widths(parse_model("conv:4@3")) == (4,)
    assert widths(classified(logistic())) == ()


def test_scaling_rounds_halves_up_and_keeps_at_least_one():
    model = parse_model("conv:3@3 dense:1 dense:10 dense:10")
    assert str(scaled(model, 1 / 2)) == "conv:2@3 dense:1 dense:5 dense:10"
    assert str(scaled(model, Fraction(1, 100))) == "conv:1@3 dense:1 dense:1 dense:10"


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("reading", ["conv", "local", "full"])
def test_a_model_matches_itself_exactly(reading, by):
    model = classified(lenet5()).with_connectivity(reading)
    found = match(model, getattr(count(model, DIGITS), by), by, DIGITS)
    assert found.error == 0 and found.value == found.target and "exactly" in str(found)
    if by != "activations":  # other widths may have as many nodes
        assert found.model == model


def test_what_a_multiplier_and_roundings_can_reach_exactly_is_reached():
    # 2.5 times 6, 16, 84 and 120 are whole; and roundings that differ from layer to layer.
    model = classified(lenet5())
    target = scaled(model, Fraction(5, 2))
    assert widths(target) == (15, 40, 210, 300)
    found = match(model, count(target, DIGITS).parameters, "parameters", DIGITS)
    assert found.error == 0
    mixed = classified(parse_model("dense:76 relu dense:25 relu dense:10"))
    found = match(classified(lenet_300_100()), count(mixed, DIGITS).macs, "macs", DIGITS)
    assert found.model == mixed and found.error == 0


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.sampled_from(["conv", "local", "full"]),
    st.integers(30, 500),
    st.sampled_from(["parameters", "connections", "activations"]),
)
def test_no_other_widths_of_one_multiplier_come_nearer(bases, reading, target, by):
    text = " ".join([f"{reading}:{bases[0]}@3", *(f"dense:{width}" for width in bases[1:]), "dense:3"])
    model, shape = parse_model(text), (5, 1)
    try:
        found = match(model, target, by, shape)
    except UserError:
        narrowest = scaled(model, Fraction(1, 10**6))
        assert getattr(count(narrowest, shape), by) > target
        return
    assert getattr(count(found.model, shape), by) == found.value
    # Every cell between the multipliers at which a width is whole, far beyond any that could matter.
    distinct = sorted(set(bases))
    edges = sorted({Fraction(k, width) for width in distinct for k in range(1, 200)} | {Fraction(0)})
    nearest = None
    for first, last in itertools.pairwise(edges):
        middle = (first + last) / 2
        choices = [{max(1, int(width * middle)), int(width * middle) + 1} for width in distinct]
        values = []
        for sizes in itertools.product(*choices):
            new = dict(zip(distinct, sizes, strict=True))
            candidate = f"{reading}:{new[bases[0]]}@3 " + " ".join(f"dense:{new[w]}" for w in bases[1:]) + " dense:3"
            values.append(getattr(count(parse_model(candidate), shape), by))
        best = min(abs(value - target) for value in values)
        nearest = best if nearest is None else min(nearest, best)
        if min(values) > 2 * target:
            break
    assert abs(found.value - target) == nearest


def test_layers_of_one_width_keep_one_width():
    model = parse_model("dense:10 relu residual(dense:10 relu dense:6 relu dense:10) dense:3")
    found = match(model, 1000, "parameters", (7,))
    found.model.shapes((7,))  # the sums of the residual still fit
    assert abs(found.error) < 0.2


def test_the_nearest_says_how_near():
    found = match(classified(lenet_300_100()), 61_706, "parameters", DIGITS)
    assert str(found) == "61,845 parameters for 61,706 (+0.23 %), widths x 0.252"
    assert str(found.model) == "dense:76 relu dense:25 relu dense:10"


@pytest.mark.parametrize(
    ("model", "target", "by", "part"),
    [
        (lenet5().full(), 61_706, "parameters", "61,706 parameters cannot be reached: full:6@5:2"),
        (lenet5().full(), 61_706, "parameters", "has 635,188 with every width 1"),
        (logistic(), 100, "macs", "has a width to change: it has 7,840 macs, not 100"),
        (lenet5(), 10**30, "weights", "has fewer with every width 1,000,000"),
        (parse_model("residual(conv:1@3) dense:4"), 9_999, "weights", "cannot change: layer 0 (residual(conv:"),
        (lenet5(), 0, "macs", "a budget must be at least 1, not 0"),
        (lenet5(), 10, "flops", "no measure 'flops' to match by; there are: parameters, weights"),
    ],
)
def test_an_impossible_target_is_a_user_error(model, target, by, part):
    with pytest.raises(UserError) as error:
        match(classified(model), target, by, DIGITS)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_outputs_alone_matches_only_itself():
    assert match(Model((Dense(3),)), 15, "weights", (5,)).error == 0
