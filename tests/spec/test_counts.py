"""Exact counts against literal tables, published figures and loops that count one by one."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from problems import initial

from cnnlib.errors import UserError
from cnnlib.nn import network as models
from cnnlib.nn.equivalence import parameter_shapes
from cnnlib.nn.network import network
from cnnlib.spec.architectures import ARCHITECTURES, neyshabur_d, neyshabur_s
from cnnlib.spec.counts import Field, count, layers
from cnnlib.spec.layers import AvgPool, Conv, Dense, Full, MaxPool, Norm, Residual
from cnnlib.spec.model import Model
from cnnlib.spec.notation import parse_model

# name: (input shape, classes, parameters, connections): every registered architecture, or the test below fails.
# VGG-16's are the figures that are published with its weights, AlexNet's layer by layer a calculation by hand.
TABLE = {
    "logistic": ((28, 28, 1), 10, 7_850, 7_840),
    "lenet_300_100": ((28, 28, 1), 10, 266_610, 266_200),
    "mlp_75_33": ((28, 28, 1), 10, 61_723, 61_605),
    "lenet5": ((28, 28, 1), 10, 61_706, 416_520),
    "two_conv": ((28, 28, 1), 10, 421_642, 4_241_152),
    "mnist1d_mlp": ((40, 1), 10, 15_210, 15_000),
    "mnist1d_cnn": ((40, 1), 10, 5_210, 31_750),
    "alexnet_v2": ((224, 224, 3), 1000, 50_303_912, 736_555_776),
    "neyshabur_s": ((32, 32, 3), 10, 6_687, 68_592),
    "neyshabur_d": ((32, 32, 3), 10, 7_277, 78_464),
    "vgg_16": ((224, 224, 3), 1000, 138_357_544, 15_470_264_320),
}
READINGS = ("conv", "local", "full")


def test_the_table_covers_every_architecture():
    assert set(TABLE) == set(ARCHITECTURES)


def registered(name):
    shape, classes, *_ = TABLE[name]
    return ARCHITECTURES.get(name).with_num_classes(classes), shape


@pytest.mark.parametrize("name", TABLE)
def test_counts_equal_the_literal_table(name):
    model, shape = registered(name)
    total = count(model, shape)
    assert (total.parameters, total.connections) == TABLE[name][2:]


@pytest.mark.parametrize("connectivity", READINGS)
@pytest.mark.parametrize("name", TABLE)
def test_counts_equal_the_initialised_arrays(name, connectivity):
    model, shape = registered(name)
    model = model.with_connectivity(connectivity)
    # Shapes only: nobody has room for VGG-16's full reading.
    variables = jax.eval_shape(network(model).init, jax.random.key(0), jnp.zeros((1, *shape)))
    total = count(model, shape)
    leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    assert total.parameters == sum(math.prod(leaf.shape) for _, leaf in leaves)
    assert total.weights == sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    # A scale and a bias for each running mean.
    norms = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0] if path[-1].key == "mean"]
    assert total.norm_parameters == 2 * sum(math.prod(leaf.shape) for leaf in norms)
    assert total.parameters == total.weights + total.biases + total.norm_parameters
    assert parameter_shapes(model, shape) == variables["params"]


def test_the_three_readings_of_lenet5_are_those_of_a_calculation_by_hand():
    model, shape = registered("lenet5")
    conv, local, full = (count(model.with_connectivity(reading), shape) for reading in READINGS)
    dense = 400 * 120 + 120 * 84 + 84 * 10
    assert conv.weights == 25 * 6 + 150 * 16 + dense
    assert local.weights == conv.connections == local.connections == 784 * 25 * 6 + 100 * 150 * 16 + dense
    assert full.weights == full.connections == 784 * 4704 + 1176 * 1600 + dense
    assert conv.biases == 6 + 16 + 214 and local.biases == full.biases == 4704 + 1600 + 214
    assert conv.activations == local.activations == full.activations == 2 * (4704 + 1600 + 204) + 1176 + 400 + 10
    # Of 28 + 4 rows 28 are inside, and 5 taps of 28 positions meet them 5 * 28 - 6 times.
    assert conv.connections_without_padding == local.connections_without_padding == 134**2 * 6 + 240_000 + dense


@pytest.mark.parametrize("alpha", [1, 4, 16])
def test_neyshaburs_families_equal_their_formulas(alpha):
    s, classes = 32, 10
    shallow, deep = (family(alpha).with_num_classes(classes) for family in (neyshabur_s, neyshabur_d))
    firsts = {"conv": 243, "local": 243 * s**2 // 4, "full": 3 * s**4 // 4}
    # Strides of 1 and 2 in turn, so neighbours have s^2 a / 2^k nodes: sums over seven products of neighbours.
    deeps = {
        "conv": 27 * alpha + 9 * 254 * alpha**2,
        "local": 27 * s**2 * alpha + 45 * s**2 * alpha**2,
        "full": 3 * s**4 * alpha + 127 * s**4 * alpha**2 // 128,
    }
    for reading in READINGS:
        weights = count(shallow.with_connectivity(reading), (s, s, 3)).weights
        assert weights == 6 * s**2 * alpha**2 + firsts[reading] * alpha + 24 * classes * alpha
        weights = count(deep.with_connectivity(reading), (s, s, 3)).weights
        assert weights == deeps[reading] + 4 * s**2 * alpha**2 + 64 * classes * alpha


def test_neyshaburs_shallow_nets_have_the_published_sizes():
    # Table 1 has 138, 147 and 256 million, and 0.007, 0.069 and 0.793 million are its formulas for alpha = 1.
    for alpha, sizes in ((150, (138, 147, 256)), (1, (0.007, 0.069, 0.793))):
        for reading, size in zip(READINGS, sizes, strict=True):
            model = neyshabur_s(alpha).with_num_classes(10).with_connectivity(reading)
            assert abs(count(model, (32, 32, 3)).weights / 1e6 - size) < (1 if alpha > 1 else 0.001)


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
        # The same layers with own weights at every position, and without locality.
        ("local:3@3x3", (32, 32, 3), 82_944, 82_944 + 3_072, 82_944, 79_524),
        ("full:3@3x3", (32, 32, 3), 9_437_184, 9_440_256, 9_437_184, 9_437_184),
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
def test_layers_with_a_window_count_what_nested_loops_count(size, inputs, outputs, window, stride, pad, dilation):
    notation = f"{outputs}@{window[0]}x{window[1]}/{stride}:{pad}:d{dilation}"
    try:
        total, local = (count(parse_model(f"{kind}:{notation}"), (*size, inputs)) for kind in ("conv", "local"))
    except UserError:
        assume(False)
    uses = inside = 0
    spans = [(k - 1) * dilation + 1 for k in window]
    starts = [range(-pad, n + pad - span + 1, stride) for n, span in zip(size, spans, strict=True)]
    for row, column in itertools.product(*starts):
        for i, j in itertools.product(range(window[0]), range(window[1])):
            uses += 1
            inside += 0 <= row + i * dilation < size[0] and 0 <= column + j * dilation < size[1]
    assert total.macs == local.macs == local.weights == uses * inputs * outputs
    assert total.macs_without_padding == local.macs_without_padding == inside * inputs * outputs


def test_a_residual_counts_its_layers_and_its_sum():
    inner, outer = count(parse_model("dense:5"), (5,)), count(parse_model("residual(dense:5)"), (5,))
    assert outer.parameters == inner.parameters and outer.macs == inner.macs
    assert outer.activations == 2 * inner.activations


def test_counting_a_spec_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="layer 0"):
        count(parse_model("conv:1@5:valid"), (4, 4, 1))


# Receptive fields: google-research/receptive_field's table, and gradients of nets that are all positive.


def geometry(*windows):
    """Layers of one feature with these windows (size, stride, padding): fields depend on nothing else."""
    return ",".join(f"conv:1@{size}/{stride}:{padding}" for size, stride, padding in windows)


def bottleneck(stride):
    """A unit of ResNet v1 as TF-Slim has it, where a 3x3 is padded by one on both sides even in strides of 2."""
    shortcut = f"|conv:1@1/{stride}" if stride > 1 else ""
    return f"residual({geometry((1, 1, 'same'), (3, stride, 1), (1, 1, 'same'))}{shortcut})"


def resnet_v1(*units):
    blocks = [bottleneck(2 if unit == depth - 1 else 1) for depth in units[:-1] for unit in range(depth)]
    blocks += [bottleneck(1)] * units[-1]
    return ",".join([geometry((7, 2, 3)), "max:3/2:same", *blocks])


def separable(stride):
    return geometry((3, stride, "same"), (1, 1, "same"))


MOBILENET = ",".join([geometry((3, 2, "same")), *map(separable, (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1))])


def before_dense(name):
    layers = ARCHITECTURES.get(name).layers
    return Model(layers[: next(i for i, layer in enumerate(layers) if isinstance(layer, Dense))])


@pytest.mark.parametrize(
    ("model", "size", "stride", "padding"),
    [
        (before_dense("alexnet_v2"), 195, 32, 64),
        (before_dense("vgg_16"), 212, 32, 90),
        (parse_model(resnet_v1(3, 4, 6, 3)), 483, 32, 239),
        (parse_model(resnet_v1(3, 4, 23, 3)), 1027, 32, 511),
        (parse_model(MOBILENET), 315, 32, 126),
    ],
    ids=["alexnet_v2", "vgg_16", "resnet_v1_50", "resnet_v1_101", "mobilenet_v1"],
)
def test_fields_equal_the_published_ones(model, size, stride, padding):
    assert layers(model, (224, 224, 3))[-1].fields == (Field(size, stride, padding),) * 2


def test_a_full_layer_sees_what_its_windows_reach():
    # Windows of 5 in steps of 5 on 13 nodes leave the last three unseen, whatever comes after.
    counts = layers(parse_model("conv:2@5/5:valid dense:3 tanh dense:2"), (13, 1))
    assert [layer.fields for layer in counts] == [(Field(5, 5, 0),)] + 3 * [(Field(10, 0, 0),)]
    # A convolution over the map of a full layer still sees the whole input everywhere.
    assert layers(parse_model("full:2@3 conv:1@3"), (8, 8, 1))[-1].fields == (Field(8, 0, 0),) * 2


def test_a_sum_of_branches_sees_what_either_sees():
    assert layers(parse_model("residual(conv:1@5)"), (9, 1))[-1].fields == (Field(5, 1, 2),)
    assert layers(parse_model("residual(conv:1@3:2+0|conv:1@3:0+2)"), (9, 1))[-1].fields == (Field(5, 1, 2),)
    # Strides of 1 and 2 that end in as many positions: what a position sees depends on where it is.
    (varies,) = layers(parse_model("residual(conv:1@3/2|conv:1@5:valid)"), (8, 1))[-1].fields
    assert varies is None
    assert layers(parse_model("residual(conv:1@3/2|conv:1@5:valid) dense:2"), (8, 1))[-1].fields == (Field(8, 0, 0),)


def seen_by_gradient(model, shape, position):
    """Per axis the first and last node of the input that moves an output position, by the gradient of a net whose
    weights are all positive; average pooling in place of maximum, since that follows one value only."""
    positive = model.replaced(lambda layer: AvgPool(*vars(layer).values()) if isinstance(layer, MaxPool) else layer)
    net = network(positive)
    x = jnp.ones((1, *shape))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    # 1 / fan-in, so that a deep net neither overflows nor vanishes.
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1 / max(1, math.prod(leaf.shape[:-1]))), variables)
    gradient = jax.jit(jax.grad(lambda x, variables: net.apply(variables, x)[(0, *position)].sum()))(x, variables)
    seen = np.argwhere(np.asarray(gradient[0]) > 0)
    return [(int(seen[:, axis].min()), int(seen[:, axis].max())) for axis in range(len(shape) - 1)]


def seen_by_count(model, shape, position):
    fields = layers(model, shape)[-1].fields
    return [
        (max(0, p * field.stride - field.padding), min(n - 1, p * field.stride - field.padding + field.size - 1))
        for field, p, n in zip(fields, position, shape, strict=False)
    ]


def test_a_net_of_trained_size_sees_by_gradient_what_is_counted():
    model, shape = before_dense("alexnet_v2"), (224, 224, 3)
    for position in ((2, 2), (0, 1)):  # in the middle, and cut off by a border
        assert seen_by_gradient(model, shape, position) == seen_by_count(model, shape, position)
    ((first, last), _) = seen_by_gradient(model, shape, (2, 2))
    assert last - first + 1 == 195
    # All positions together, and so a dense layer on them, miss the last five rows: windows and pooling leave a rest.
    (dense,) = layers(Model((*model.layers, Dense(1))), shape)[-1].fields[:1]
    assert dense == Field(219, 0, 0) and seen_by_gradient(model, shape, (4, 4))[0][1] == 218


def reached(layers, seen):
    """Which nodes of a signal move which position, `(positions, nodes)`, tap by tap."""
    for layer in layers:
        if isinstance(layer, Residual):
            seen = reached(layer.layers, seen) + reached(layer.shortcut, seen)
        elif isinstance(layer, Conv):
            window = layer.window((len(seen), 1))
            ((low, _),), (s,), (d,) = window.padding, window.strides, window.dilation
            taps = [[p * s - low + t * d for t in range(window.size[0])] for p in range(*window.output_size)]
            seen = np.stack([sum([seen[t] for t in row if 0 <= t < len(seen)], 0 * seen[0]) for row in taps])
    return seen


windows = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(1, 2))


@given(st.lists(st.tuples(windows, st.booleans()), min_size=1, max_size=4), st.integers(9, 24))
@settings(max_examples=50, deadline=None)
def test_fields_through_branches_are_those_that_taps_reach(parts, size):
    text = ""
    for (k, s, p, d), branches in parts:
        same = f"conv:1@{k}/{s}:same:d{d}"
        text += f"residual({same}|conv:1@1/{s}:same) " if branches else f"conv:1@{k}/{s}:{p}:d{d} relu "
    model = parse_model(text)
    for nodes in (size, 160):
        try:
            (field,) = layers(model, (nodes, 1))[-1].fields
        except UserError:
            assume(False)
        seen = reached(model.layers, np.eye(nodes, dtype=int)) > 0
        for position, found in enumerate(map(np.flatnonzero, seen)):
            first = position * field.stride - field.padding
            last = first + field.size - 1
            assert all(first <= node <= last for node in found)
            if first >= 50 and last < 110:  # far from the borders a field ends at nodes that are seen
                assert (found[0], found[-1]) == (first, last)
    seen = reached(model.layers, np.eye(size, dtype=int)) > 0
    (dense,) = layers(Model((*model.layers, Dense(1))), (size, 1))[-1].fields
    everything = np.flatnonzero(seen.any(axis=0))
    if not len(everything):  # strides that step over windows of one may see padding only
        return
    assert -dense.padding <= everything[0] and everything[-1] < dense.size - dense.padding <= size


# What a training step keeps, beside what JAX keeps.


@pytest.mark.parametrize(
    "text",
    [
        "conv:4@3 relu conv:5@3/2 relu dense:6 relu dense:3",
        pytest.param("local:4@3 relu avg:2 full:3@3 relu dense:3", marks=pytest.mark.slow),
        pytest.param("dense:7 relu residual(dense:7 relu) dense:3", marks=pytest.mark.slow),
        pytest.param("conv:4@3 relu residual(conv:4@3 relu|conv:4@1) relu dense:3", marks=pytest.mark.slow),
        "conv:4@3 relu max:2 dense:3",
        "conv:4@3:nobias norm relu dense:6:nobias norm relu residual(norm relu dense:6) dense:3",
    ],
)
def test_what_is_kept_is_what_jax_keeps(text, monkeypatch):
    # In the order of the layers: the network's own moves pooling, which keeps a smaller map.
    monkeypatch.setattr(models, "pools_before_bias", lambda layers: {})
    model, shape, batch = parse_model(text), (8, 8, 2), 5
    net, x = network(model), jnp.asarray(np.random.RandomState(0).normal(size=(batch, *shape)), jnp.float32)
    parameters, statistics = initial(net, jax.random.key(0), shape)
    _, pull = jax.vjp(lambda p: models.training_logits(net, p, statistics, x)[0], parameters)
    # Beside the values JAX keeps the weights, zeros and signs for ReLUs, some values twice in two shapes or orders, and
    # x as a constant. Of a norm it keeps a few numbers a channel, which are fewer than those of any map of the batch.
    weights = {tuple(np.sort(np.asarray(leaf), axis=None)) for leaf in jax.tree.leaves(parameters)}
    kept = {tuple(np.sort(np.asarray(leaf), axis=None)) for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32}
    kept |= {tuple(np.sort(np.asarray(x), axis=None))}
    values = sum(len(values) for values in kept - weights if any(values) and len(values) > 6)
    signs = sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.dtype == bool)
    total = count(model, shape)
    norms = total.kept_norms * batch
    assert (total.kept_values * batch + norms, total.kept_signs * batch) == (values, signs)
    assert total.activation_bytes(batch) == 4 * values + signs
    assert total.activation_bytes(batch, "bfloat16") == 2 * values + 2 * norms + signs
    assert norms == sum(batch * math.prod(each.output_shape) for each in layers(model, shape) if each.layer == Norm())


# Multiply-adds beside XLA's own account of a forward pass on a CPU. Its rule: two FLOPs a multiply-add, and taps on
# padding are none in a convolution; one for each bias that is added, each ReLU, and for each comparison of a pooling.


def stock_forward(model, parameters, x):
    """The forward pass in JAX's own operations; norms as after training, when all that they do is folded."""
    for index, layer in enumerate(model.layers):
        entry = parameters.get(f"layer_{index}")
        match layer:
            case Conv():
                window = layer.window(x.shape[1:])
                dimensions = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}[x.ndim]
                x = lax.conv_general_dilated(
                    x, entry["kernel"], window.strides, window.padding, None, window.dilation, dimensions
                )
            case Dense() | Full():
                shape = layer.output_shape(x.shape[1:])
                x = (x.reshape(1, -1) @ entry["kernel"]).reshape(1, *shape)
            case MaxPool():
                window, strides = layer.window(x.shape[1:]), (1, *layer.window(x.shape[1:]).strides, 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, *window.size, 1), strides, "VALID")
            case Norm():
                x = (x - jnp.ones_like(x)) * jnp.broadcast_to(entry["scale"], x.shape)
            case Residual():
                x = x + stock_forward(Model(layer.layers), entry, x)
            case _:
                x = jnp.maximum(x, 0)
        if entry and "bias" in entry:
            x = x + jnp.broadcast_to(entry["bias"], x.shape)
    return x


def xla_flops(model, shape):
    """What XLA's rule makes of our counts."""
    flops = 0
    for layer in layers(model, shape):
        outputs = math.prod(layer.output_shape)
        flops += 2 * layer.count.macs_without_padding
        match layer.layer:
            case Conv() | Dense() | Full():
                flops += outputs * layer.layer.use_bias
            case MaxPool():
                flops += outputs * (math.prod(layer.layer.window(layer.input_shape).size) - 1)
            case Norm():
                flops += 3 * outputs
            case _:  # a ReLU, or the sum of a residual
                flops += outputs
    return flops


@pytest.mark.parametrize("connectivity", ["conv", "full"])
@pytest.mark.parametrize("name", TABLE)
def test_multiply_adds_are_those_that_xla_counts(name, connectivity):
    model, shape = registered(name)
    model = model.with_connectivity(connectivity)
    variables = jax.eval_shape(network(model).init, jax.random.key(0), jnp.zeros((1, *shape)))
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    lowered = jax.jit(lambda p, x: stock_forward(model, p, x)).lower(variables["params"], example)
    # XLA counts in float32.
    assert lowered.cost_analysis()["flops"] == pytest.approx(xla_flops(model, shape), rel=1e-6)


@pytest.mark.parametrize("name", ["lenet5", "two_conv", "mnist1d_cnn"])
def test_multiply_adds_of_a_local_net_are_those_of_its_products(name, monkeypatch):
    # A product over windows multiplies their padding too. XLA sees nothing of what kernels.cc does.
    monkeypatch.setenv("CNNLIB_KERNELS", "xla")
    model, shape = registered(name)
    model = model.local()
    net = network(model)
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape)))
    lowered = jax.jit(net.apply).lower(variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    found = lowered.cost_analysis()["flops"]
    total = count(model, shape)
    others = sum(
        math.prod(layer.output_shape)
        * (
            math.prod(layer.layer.window(layer.input_shape).size) - 1
            if isinstance(layer.layer, MaxPool)
            else getattr(layer.layer, "use_bias", True)
        )
        for layer in layers(model, shape)
    )
    assert found == pytest.approx(2 * total.macs + others, rel=1e-6)
