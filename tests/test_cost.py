"""Exact counts against literal tables, published figures and loops that count one by one."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cnnlib.architectures import ARCHITECTURES
from cnnlib.cost import count
from cnnlib.errors import UserError
from cnnlib.models import network
from cnnlib.spec import parse_model

# name: (input shape, parameters, connections): every registered architecture, or the test below fails.
TABLE = {
    "logistic": ((28, 28, 1), 7_850, 7_840),
    "lenet_300_100": ((28, 28, 1), 266_610, 266_200),
    "mlp_75_33": ((28, 28, 1), 61_723, 61_605),
    "lenet5": ((28, 28, 1), 61_706, 416_520),
    "two_conv": ((28, 28, 1), 421_642, 4_241_152),
    "mnist1d_mlp": ((40, 1), 15_210, 15_000),
    "mnist1d_cnn": ((40, 1), 5_210, 31_750),
}


def test_the_table_covers_every_architecture():
    assert set(TABLE) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TABLE)
def test_counts_equal_the_literal_table(name):
    shape, parameters, connections = TABLE[name]
    total = count(ARCHITECTURES.get(name).with_num_classes(10), shape)
    assert (total.parameters, total.connections) == (parameters, connections)


@pytest.mark.parametrize("name", TABLE)
def test_counts_equal_the_initialised_arrays(name):
    shape = TABLE[name][0]
    model = ARCHITECTURES.get(name).with_num_classes(10)
    variables = jax.eval_shape(network(model).init, jax.random.key(0), jnp.zeros((1, *shape)))
    total = count(model, shape)
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    assert total.parameters == sum(leaf.size for _, leaf in leaves)
    assert total.biases == sum(leaf.size for path, leaf in leaves if path[-1].key == "bias")


@pytest.mark.parametrize(
    ("text", "shape", "weights", "parameters", "connections", "without_padding"),
    [
        # The article's: 32x32 colour into as many nodes, fully connected and as a 3x3 convolution.
        ("dense:3072", (32, 32, 3), 9_437_184, 9_440_256, 9_437_184, 9_437_184),
        ("conv:3@3x3", (32, 32, 3), 81, 84, 82_944, 79_524),
        ("dense:1000000", (1000, 1000, 1), 10**12, 10**12 + 10**6, 10**12, 10**12),
        ("conv:1@3x3", (1000, 1000, 1), 9, 10, 9_000_000, 8_988_004),
        # flax issue 3392: 256 FLOPs as Keras counts, 196 as XLA counts; two FLOPs a multiply-add.
        ("conv:2@2x2", (4, 4, 1), 8, 10, 256 // 2, 196 // 2),
    ],
)
def test_published_figures_to_the_unit(text, shape, weights, parameters, connections, without_padding):
    total = count(parse_model(text), shape)
    assert (total.weights, total.parameters) == (weights, parameters)
    assert (total.connections, total.connections_without_padding) == (connections, without_padding)
    assert (total.macs, total.macs_without_padding) == (connections, without_padding)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
)
def test_a_convolution_counts_what_nested_loops_count(size, inputs, outputs, window, stride, pad, dilation):
    notation = f"conv:{outputs}@{window[0]}x{window[1]}/{stride}:{pad}:d{dilation}"
    try:
        total = count(parse_model(notation), (*size, inputs))
    except UserError:
        assume(False)
    uses = inside = 0
    spans = [(k - 1) * dilation + 1 for k in window]
    starts = [range(-pad, n + pad - span + 1, stride) for n, span in zip(size, spans, strict=True)]
    for row, column in itertools.product(*starts):
        for i, j in itertools.product(range(window[0]), range(window[1])):
            uses += 1
            inside += 0 <= row + i * dilation < size[0] and 0 <= column + j * dilation < size[1]
    assert total.macs == uses * inputs * outputs
    assert total.macs_without_padding == inside * inputs * outputs


def test_a_residual_counts_its_layers_and_its_sum():
    inner, outer = count(parse_model("dense:5"), (5,)), count(parse_model("residual(dense:5)"), (5,))
    assert outer.parameters == inner.parameters and outer.macs == inner.macs
    assert outer.activations == 2 * inner.activations


def test_counting_a_spec_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="layer 0"):
        count(parse_model("conv:1@5:valid"), (4, 4, 1))
