from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnlib.errors import UserError
from cnnlib.spec.architectures import ARCHITECTURES, lenet5, mlp
from cnnlib.spec.layers import Activation, AvgPool, Conv, Dense, Full, Local, MaxPool, Norm, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.notation import parse_model
from cnnlib.spec.window import Window, pad_pairs

pytestmark = pytest.mark.once

per_axis = st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
padding = st.one_of(
    st.sampled_from(["SAME", "VALID"]),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=2).map(tuple),
)


def filters(kind):
    """Layers with a window: features are a multiple of the groups."""
    arguments = st.tuples(st.integers(1, 9), per_axis, per_axis, padding, per_axis, st.booleans(), st.integers(1, 9))
    return arguments.map(lambda a: kind(a[0] * a[-1], *a[1:]))


plain_layers = st.one_of(
    *map(filters, (Conv, Local, Full)),
    st.builds(Dense, st.one_of(st.integers(1, 9999), st.just("classes")), st.booleans()),
    st.builds(MaxPool, per_axis, st.none() | per_axis, padding),
    st.builds(AvgPool, per_axis, st.none() | per_axis, padding),
    st.sampled_from([Activation("relu"), Activation("tanh"), Norm()]),
)
branches = st.lists(plain_layers, min_size=1, max_size=3).map(tuple)
layers = st.one_of(plain_layers, st.builds(Residual, branches), st.builds(Residual, branches, branches))


@given(st.lists(layers, min_size=1, max_size=5).map(lambda x: Model(tuple(x))))
def test_notation_is_lossless(model):
    assert parse_model(str(model)) == model


def test_layers_may_be_apart_by_blanks_or_commas():
    assert parse_model("conv:6@5 relu,max:2  dense:classes") == parse_model("conv:6@5,relu,max:2,dense:classes")


@pytest.mark.parametrize(
    "text",
    [
        "conv:3",
        "conv:3@",
        "conv:x@3",
        "conv:3@3:3:3",
        "max",
        "max:2:nobias",
        "dense",
        "dense:3:5",
        "dense:-1",
        "relu:2",
        "norm:2",
        "norm:nobias",
        "residual(relu",
        "residual()",
        "residual(|relu)",
        "residual(relu|tanh|relu)",
        "relu|tanh",
        "local:3",
        "full:3@",
        "relu)",
        "(relu)",
        "conv:3@3/0",
        "max:2/0",
        "conv:6@3/99999999999999999999",
        "conv:6@3:99999999999",
        "lenet",
        "",
        "residual(" * 3000,
    ],
)
def test_what_is_no_notation_is_said_in_one_line(text):
    with pytest.raises(UserError) as error:
        parse_model(text)
    assert "\n" not in str(error.value)


def test_lenet5_has_the_maps_of_the_paper():
    # LeCun 1998, figure 2, with 28x28 inputs padded to 32x32.
    shapes = lenet5().with_num_classes(10).shapes((28, 28, 1))
    maps = [shape for layer, shape in zip(lenet5().layers, shapes, strict=True) if not isinstance(layer, Activation)]
    assert maps == [(28, 28, 6), (14, 14, 6), (10, 10, 16), (5, 5, 16), (120,), (84,), (10,)]


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_padding_gives_one_output_a_stride(n, k, s, d):
    window = Window((n,), (k,), (s,), (d,), pad_pairs("SAME", (n,), (k,), (s,), (d,)))
    assert window.output_size == (-(-n // s),)


@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_taps_inside_equal_those_counted_one_by_one(n, k, s, d, pair):
    window = Window((n,), (k,), (s,), (d,), (pair,))
    positions = [start + tap * d for start in range(0, n + sum(pair) - (k - 1) * d, s) for tap in range(k)]
    assert len(positions) == max(window.output_size[0], 0) * k
    if window.output_size[0] > 0:
        assert window.taps_inside == sum(pair[0] <= position < pair[0] + n for position in positions)


@pytest.mark.parametrize(
    ("text", "shape", "part"),
    [
        ("conv:1@5:valid", (4, 4, 1), "kernel conv:1@5:valid spans 5, its map has only 4"),
        ("conv:1@3:valid:d4", (8, 8, 1), "spans 9"),
        ("conv:1@99", (28, 28, 1), "spans 99"),
        ("max:5", (4, 4, 1), "window max:5 spans 5"),
        ("max:2:2", (4, 4, 1), "has padding of 2: it must be less than the window"),
        ("avg:3/1:0+3", (4, 1), "has padding of 3: it must be less than the window"),
        ("conv:1@3x3", (28, 1), "has 2 axes, its input has 1"),
        ("dense:3 conv:1@3", (28, 28, 1), "its input is a vector of 3"),
        ("residual(dense:3)", (4,), "must keep the shape"),
        ("residual(conv:2@3|conv:3@1)", (4, 4, 1), "turns 4x4x1 into 4x4x2: its shortcut makes 4x4x3"),
        ("dense:classes", (4,), "classes is not known"),
    ],
)
def test_a_layer_that_does_not_fit_is_named_with_its_input(text, shape, part):
    with pytest.raises(UserError, match="layer") as error:
        parse_model(text).shapes(shape)
    assert part in str(error.value)


def test_connectivity_is_conv_as_soon_as_weights_are_shared():
    assert mlp(3).connectivity == "full"
    assert lenet5().connectivity == "conv"
    assert parse_model("residual(conv:1@3) dense:classes").connectivity == "conv"
    assert parse_model("residual(dense:3|local:1@3) conv:1@3").connectivity == "conv"
    assert parse_model("local:1@3 full:1@3 dense:classes").connectivity == "local"
    assert parse_model("full:1@3 dense:classes").connectivity == "full"


def test_the_number_of_classes_reaches_every_layer():
    model = parse_model("residual(dense:classes|dense:classes) dense:classes").with_num_classes(7)
    assert model == parse_model("residual(dense:7|dense:7) dense:7")


def test_every_architecture_reads_back_from_its_notation():
    for name in ARCHITECTURES:
        assert parse_model(str(ARCHITECTURES.get(name))) == ARCHITECTURES.get(name)
