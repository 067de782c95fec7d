"""Against PyTorch: values and gradients of 2,000 random operations and of its own tests' cases, and counts of nets."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import using

from cnnlib import ops
from cnnlib.ops import kernels
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.spec.counts import count
from cnnlib.spec.layers import Activation, AvgPool, Conv, Dense, MaxPool, Norm, Residual
from cnnlib.spec.notation import parse_model

SEEDS, PROGRAMS, TOGETHER = 8, 10, 25
"""Seeds, programs per seed, and operations per program."""
KINDS = ("conv", "conv", "conv, max_pool", "conv_transpose", "local", "max_pool", "avg_pool")
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float64": 2.0**-53}
"""Largest relative error of one number."""


class Drawn(NamedTuple):
    """An operation that was drawn."""

    kind: str
    operands: tuple[np.ndarray, ...]
    arguments: dict
    pool: dict | None


def drawn(random, kind):
    """Draw an operation: channels last, the kernel (*window, channel per group, feature)."""
    axes = int(random.randint(1, 3))
    numbers = lambda low, high: tuple(int(n) for n in random.randint(low, high, axes))  # noqa: E731
    groups, batch = int(random.choice([1, 1, 2, 3])), int(random.choice([1, 3, 8]))
    channels, features = (groups * int(random.choice([1, 2, 3, 8])) for _ in range(2))
    size, window, strides, dilation = numbers(3, 15), numbers(1, 6), numbers(1, 4), numbers(1, 3)
    padding = tuple((int(low), int(high)) for low, high in random.randint(0, 4, (axes, 2)))
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    padded = [n + sum(pair) for n, pair in zip(size, padding, strict=True)]
    # cnnlib refuses windows that reach over both borders by more than the image has.
    if any(span > min(n, 2 * own + 1) for span, n, own in zip(spans, padded, size, strict=True)):
        return drawn(random, kind)
    positions = tuple((n - span) // s + 1 for n, span, s in zip(padded, spans, strides, strict=True))
    if kind in ("max_pool", "avg_pool"):
        if any(max(pair) >= k for pair, k in zip(padding, window, strict=True)):
            return drawn(random, kind)  # a window on padding alone has no value
        arguments = {"window_shape": window, "strides": strides, "padding": padding}
        if kind == "avg_pool":
            arguments["count_include_pad"] = bool(random.randint(2))
        return Drawn(kind, (random.normal(size=(batch, *size, channels)),), arguments, None)
    arguments = {"strides": strides, "padding": padding, "dilation": dilation, "feature_group_count": groups}
    kernel = random.normal(size=(*window, channels // groups, features))
    if kind == "local":
        kernel = random.normal(size=(*positions, *kernel.shape))
    if kind == "conv_transpose":
        arguments["output_size"] = size
        return Drawn(kind, (random.normal(size=(batch, *positions, features)), kernel), arguments, None)
    pool = None
    if kind == "conv, max_pool":
        pool = {"window_shape": tuple(min(n, int(random.randint(1, 4))) for n in positions), "strides": None}
        pool["strides"] = pool["window_shape"] if random.randint(2) else numbers(1, 3)
    return Drawn(kind, (random.normal(size=(batch, *size, channels)), kernel), arguments, pool)


def ours(one, *operands):
    axes = operands[0].ndim - 2
    name = one.kind if "pool" in one.kind and one.pool is None else f"{one.kind.removesuffix(', max_pool')}{axes}d"
    pool = {} if one.pool is None else {"pool": MaxPool(**one.pool)}
    return getattr(ops, name)(*operands, **one.arguments, **pool)


def theirs(torch, one, x, kernel=None):
    """Compute the same by PyTorch, which has channels first and no padding of different sides in its convolutions."""
    functional, axes, arguments = torch.nn.functional, x.ndim - 2, one.arguments
    first = lambda maps: maps.movedim(-1, 1).contiguous()  # noqa: E731
    last = lambda maps: maps.movedim(1, -1)  # noqa: E731
    sides = [side for pair in reversed(arguments["padding"]) for side in pair]
    max_pool = {1: functional.max_pool1d, 2: functional.max_pool2d}[axes]
    if one.kind == "max_pool":
        padded = functional.pad(first(x), sides, value=-np.inf)
        return last(max_pool(padded, arguments["window_shape"], arguments["strides"]))
    if one.kind == "avg_pool":
        pool = functools.partial(
            {1: functional.avg_pool1d, 2: functional.avg_pool2d}[axes],
            kernel_size=arguments["window_shape"],
            stride=arguments["strides"],
        )
        mean = pool(functional.pad(first(x), sides))
        if not arguments["count_include_pad"]:
            mean = mean / pool(functional.pad(torch.ones_like(first(x)), sides))
        return last(mean)
    groups = arguments["feature_group_count"]
    if one.kind == "local":
        return local(torch, x, kernel, arguments, sides)
    weights = kernel.movedim((-1, -2), (0, 1)).contiguous()
    shared = {"stride": arguments["strides"], "dilation": arguments["dilation"], "groups": groups}
    if one.kind == "conv_transpose":
        transposed = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d}[axes]
        whole = last(transposed(first(x), weights, **shared))
        for axis, (n, (low, _)) in enumerate(zip(arguments["output_size"], arguments["padding"], strict=True)):
            missing = max(0, low + n - whole.shape[1 + axis])
            fill = [0, 0] * (axes - axis) + [0, missing]
            whole = functional.pad(whole, fill).narrow(1 + axis, low, n)
        return whole
    conv = {1: functional.conv1d, 2: functional.conv2d}[axes]
    y = conv(functional.pad(first(x), sides), weights, **shared)
    return last(y if one.pool is None else max_pool(y, one.pool["window_shape"], one.pool["strides"]))


def local(torch, x, kernel, arguments, sides):
    """Compute a local layer: the values under each window times the weights of its position."""
    axes, groups = x.ndim - 2, arguments["feature_group_count"]
    window, positions = kernel.shape[axes : 2 * axes], kernel.shape[:axes]
    maps = torch.nn.functional.pad(x.movedim(-1, 1), sides)
    strides, dilation = arguments["strides"], arguments["dilation"]
    if axes == 1:  # a signal is an image of height 1
        maps, window, strides, dilation = maps[:, :, None], (1, *window), (1, *strides), (1, *dilation)
    under = torch.nn.functional.unfold(maps, tuple(window), dilation=dilation, stride=strides)
    under = under.reshape(x.shape[0], groups, x.shape[-1] // groups, *kernel.shape[axes : 2 * axes], *positions)
    by_group = kernel.reshape(*kernel.shape[:-1], groups, kernel.shape[-1] // groups)
    letters = ("nghip", "pihgf->npgf") if axes == 1 else ("nghijpq", "pqijhgf->npqgf")
    y = torch.einsum(",".join(letters), under, by_group)
    return y.reshape(x.shape[0], *positions, kernel.shape[-1])


def compare(torch, chosen, dtype, form, random):
    """Assert that the operations `chosen` have the values and gradients of PyTorch's, computed there in float64."""
    rounded = [[operand.astype(jnp.dtype(dtype)) for operand in one.operands] for one in chosen]
    tensors = [
        [torch.tensor(np.asarray(operand, np.float64), requires_grad=True) for operand in operands]
        for operands in rounded
    ]
    values = [theirs(torch, one, *own) for one, own in zip(chosen, tensors, strict=True)]
    cotangents = [random.normal(size=tuple(y.shape)).astype(jnp.dtype(dtype)) for y in values]

    @jax.jit
    def everything(operands, cotangents):
        found = []
        for one, own, cotangent in zip(chosen, operands, cotangents, strict=True):
            y, pull = jax.vjp(functools.partial(ours, one), *own)
            found.append((y, *pull(cotangent)))
        return found

    with using(form):
        found = everything(rounded, cotangents)
    for one, own, y, cotangent, results in zip(chosen, tensors, values, cotangents, found, strict=True):
        gradients = torch.autograd.grad(y, own, torch.tensor(np.asarray(cotangent, np.float64)))
        for what, result, right in zip(("value", "to x", "to the kernel"), results, (y, *gradients), strict=False):
            if dtype == "bfloat16" and "max_pool" in one.kind and what != "value":
                continue  # rounding may decide which value is the largest
            # Sums have up to a few thousand terms of size 1, whose rounding adds up like a random walk. Those of
            # bfloat16 are mostly added up in float32.
            expected = right.detach().numpy()
            tolerance = (
                (8 if dtype == "bfloat16" else 64) * ROUNDING[dtype] * max(1.0, np.abs(expected).max(initial=0.0))
            )
            assert result.dtype == jnp.dtype(dtype), (dtype, one.kind)
            assert result.shape == expected.shape, (result.shape, expected.shape, one)
            worst = np.abs(np.asarray(result, np.float64) - expected).max(initial=0.0)
            assert worst <= tolerance, f"{form}, {dtype}, {one.kind} {one.arguments}, {what}: {worst} > {tolerance}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_operations_agree_with_pytorch(seed, float64):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # operations are small
    random = np.random.RandomState(seed)
    dtypes = ["float32"] * 10 + ["bfloat16", "float64"]
    forms = ["xla", "gpu", "tpu"] + ["native"] * (0 if kernels.register() else 9)
    for _ in range(PROGRAMS):
        dtype, form = random.choice(dtypes), random.choice(forms)
        compare(torch, [drawn(random, random.choice(KINDS)) for _ in range(TOGETHER)], dtype, form, random)


# The shapes and arguments that PyTorch's own tests of these functions use (OpInfo, torch 2.13:
# torch/testing/_internal/common_methods_invocations.py, `sample_inputs_*`), channels first, without three dimensions.
# Not here: what cnnlib does not have (`ceil_mode`, dilated pooling, `divisor_override`, inputs without a batch). One
# `output_padding` of PyTorch's is 3 at stride 2, which no convolution takes back: here it is 1.
CONV = [
    ((1, 3, 4), (3, 3, 3), {"strides": 2, "padding": 2}),
    ((2, 4, 8), (2, 2, 3), {"strides": 3, "padding": 1, "groups": 2, "dilation": 2}),
    ((1, 4, 5), (1, 4, 3), {"strides": 2}),
    ((2, 2, 4), (2, 1, 4), {"padding": "same", "groups": 2, "dilation": 2}),
    ((1, 4, 5), (3, 4, 3), {}),
    ((1, 3, 4, 4), (3, 3, 3, 3), {"strides": 2, "padding": 2}),
    ((2, 4, 8, 8), (2, 2, 3, 3), {"strides": (3, 2), "padding": (2, 1), "groups": 2, "dilation": 4}),
    ((1, 4, 5, 5), (1, 4, 2, 3), {"strides": 2, "padding": 1, "dilation": (2, 3)}),
    ((1, 2, 4, 3), (4, 2, 3, 4), {"strides": 2, "padding": 1}),
    ((1, 4, 5, 5), (1, 4, 2, 3), {"strides": 2}),
    ((1, 4, 5, 5), (1, 4, 2, 3), {"padding": "same", "dilation": 3}),
    ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4}),
    ((2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}),
    ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "strides": (3, 2)}),
    ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    ((2, 4, 5, 5), (4, 1, 2, 2), {"groups": 4, "dilation": 2}),
    ((2, 4, 6, 5), (6, 2, 3, 2), {"groups": 2}),
    ((1, 4, 5, 5), (3, 4, 3, 3), {}),
]
CONV_TRANSPOSE = [
    ((1, 3, 4), (3, 3, 3), {"strides": 2, "padding": 2, "output_padding": 1}),
    ((2, 2, 4), (2, 2, 4), {"strides": 3, "padding": 1, "output_padding": 2, "groups": 2, "dilation": 4}),
    ((1, 1, 4), (1, 1, 4), {"strides": 2, "padding": 1, "output_padding": 1, "dilation": 2}),
    ((1, 1, 4), (1, 2, 3), {"strides": 2, "padding": 1, "output_padding": 1}),
    ((1, 4, 5), (4, 8, 3), {}),
    ((1, 3, 4, 4), (3, 3, 3, 3), {"strides": 2, "padding": 2, "output_padding": 1}),
    (
        (2, 2, 4, 4),
        (2, 2, 4, 5),
        {"strides": (3, 2), "padding": (1, 2), "output_padding": (2, 1), "groups": 2, "dilation": 4},
    ),
    ((1, 1, 4, 5), (1, 1, 4, 3), {"strides": 2, "padding": 1, "output_padding": 1, "dilation": (2, 3)}),
    ((1, 1, 4, 3), (1, 2, 3, 4), {"strides": 2, "padding": 1, "output_padding": 1}),
    ((2, 4, 4, 4), (4, 1, 3, 3), {"groups": 4}),
    ((1, 2, 5, 5), (2, 4, 3, 3), {}),
]
AVG_POOL = [
    ((2, 3, 9), 3, {"strides": 3}),
    ((1, 3, 9), 3, {"strides": 1, "padding": 1, "count_include_pad": False}),
    ((1, 3, 9), 6, {"strides": 3, "padding": 2}),
    ((2, 3, 9), 3, {"strides": 1, "padding": 1}),
    ((0, 3, 9), 6, {"strides": 3, "padding": 2}),
    ((1, 2, 9), 7, {"strides": 3, "padding": 2}),
    ((1, 2, 9), 7, {"strides": 3, "padding": 3}),
    ((1, 2, 9), 7, {"strides": 3}),
    ((1, 3, 9, 9), 3, {"strides": 1, "padding": 1, "count_include_pad": False}),
    ((1, 3, 9, 9), 4, {"strides": (2, 3), "padding": 1, "count_include_pad": False}),
    ((1, 3, 9, 9), 6, {"strides": 3, "padding": (2, 3)}),
    ((1, 1, 4, 4), 2, {"strides": 2}),
    ((1, 2, 6, 6), 4, {"strides": 2, "padding": 2}),
    ((1, 3, 9, 9), 3, {"strides": 3}),
]
MAX_POOL = [
    (shape, window, {"strides": strides, "padding": padding})
    for shape in ((1, 2, 3), (2, 2, 6), (1, 2, 3, 6), (2, 2, 6, 3))
    for window in (3, (3, 2)[: len(shape) - 2])
    for strides in (2, (2, 1)[: len(shape) - 2])
    for padding in (0, 1)
]


def tabled(kind, shape, weights, arguments, random):
    """Make an operation from an entry of a table of PyTorch's."""
    size = shape[2:]
    arguments = dict(arguments)
    window, strides, dilation, padding, more = (
        np.broadcast_to(value, len(size)) if value != "same" else value
        for value in (
            weights[2:] if "conv" in kind else weights,
            arguments.get("strides", 1),
            arguments.get("dilation", 1),
            arguments.get("padding", 0),
            arguments.get("output_padding", 0),
        )
    )
    spans = (window - 1) * dilation + 1 if "conv" in kind else window
    if isinstance(padding, str):
        pairs = [(int((span - 1) // 2), int((span - 1) - (span - 1) // 2)) for span in spans]
    else:
        pairs = [(int(side), int(side)) for side in padding]
    own = {"strides": tuple(strides.tolist()), "padding": tuple(pairs)}
    x = random.normal(size=(shape[0], *size, shape[1]))
    if "pool" in kind:
        own |= {"window_shape": tuple(window.tolist())}
        if kind == "avg_pool":
            own["count_include_pad"] = arguments.get("count_include_pad", True)
        return Drawn(kind, (x,), own, None)
    own |= {"dilation": tuple(dilation.tolist()), "feature_group_count": arguments.get("groups", 1)}
    if kind == "conv_transpose":
        sides = [low + high for low, high in pairs]
        own["output_size"] = tuple(((np.asarray(size) - 1) * strides - sides + spans + more).tolist())
    kernel = random.normal(size=(*weights[2:], weights[1], weights[0]))
    return Drawn(kind, (x, kernel), own, None)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["native", "xla", "gpu", "tpu"])
@pytest.mark.parametrize(
    ("kind", "table"),
    [("conv", CONV), ("conv_transpose", CONV_TRANSPOSE), ("avg_pool", AVG_POOL), ("max_pool", MAX_POOL)],
)
def test_the_cases_of_pytorchs_own_tests_agree(kind, table, form, float64):
    torch = pytest.importorskip("torch")
    if form == "native" and kernels.register():
        pytest.skip("no C++ compiler")
    random = np.random.RandomState(0)
    compare(torch, [tabled(kind, *case, random) for case in table], "float32", form, random)


def their_net(torch, layers, shape):
    """Build the layers in PyTorch. The shape of their input has the channels last."""
    nn, made = torch.nn, []

    class Sum(nn.Module):
        def __init__(self, *branches):
            super().__init__()
            self.branches = nn.ModuleList(branches)

        def forward(self, x):
            return sum(branch(x) for branch in self.branches)

    for layer in layers:
        axes, channels = len(shape) - 1, shape[-1]
        if isinstance(layer, Conv | MaxPool | AvgPool):
            window = layer.window(shape)
            sides = [side for pair in reversed(window.padding) for side in pair]
            made.append({1: nn.ConstantPad1d, 2: nn.ConstantPad2d}[axes](sides, 0.0))
        if isinstance(layer, Conv):
            conv = {1: nn.Conv1d, 2: nn.Conv2d}[axes]
            numbers = {"stride": window.strides, "dilation": window.dilation, "groups": layer.groups}
            made.append(conv(channels, layer.features, window.size, **numbers, bias=layer.use_bias))
        elif isinstance(layer, MaxPool):
            made.append({1: nn.MaxPool1d, 2: nn.MaxPool2d}[axes](window.size, window.strides))
        elif isinstance(layer, AvgPool):
            made.append({1: nn.AvgPool1d, 2: nn.AvgPool2d}[axes](window.size, window.strides))
        elif isinstance(layer, Dense):
            made += [nn.Flatten(), nn.Linear(int(np.prod(shape)), layer.num_units, bias=layer.use_bias)]
        elif isinstance(layer, Norm):
            made.append({0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[axes](channels))
        elif isinstance(layer, Activation):
            made.append(nn.ReLU())
        elif isinstance(layer, Residual):
            made.append(Sum(*(their_net(torch, branch, shape) for branch in (layer.layers, layer.shortcut))))
        shape = layer.output_shape(shape)
    return nn.Sequential(*made)


NETS = [
    *((str(ARCHITECTURES.get(name).with_num_classes(10)), (28, 28, 1)) for name in ("lenet_300_100", "lenet5")),
    *((str(ARCHITECTURES.get(name).with_num_classes(10)), (32, 32, 3)) for name in ("neyshabur_s", "neyshabur_d")),
    *((str(ARCHITECTURES.get(name).with_num_classes(10)), (40, 1)) for name in ("mnist1d_mlp", "mnist1d_cnn")),
    *((str(ARCHITECTURES.get(name).with_num_classes(1000)), (224, 224, 3)) for name in ("alexnet_v2", "vgg_16")),
    ("conv:12@3:nobias norm relu conv:12@3/2:1+2x0+3:g12 relu conv:9@1:g3 avg:2/1 dense:5", (13, 11, 3)),
    (
        "conv:8@5:d2 relu residual(conv:6@3/2 norm relu|conv:6@1/2:nobias) max:3/2 dense:7 norm dense:3",
        (17, 17, 2),
    ),
    ("conv:6@4/3:valid:g2 relu residual(conv:6@3:g6) max:2 dense:4:nobias", (50, 4)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "shape"), NETS)
def test_parameters_and_multiply_adds_of_a_net_are_those_that_pytorch_counts(text, shape):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    model = parse_model(text)
    with torch.device("meta"):  # shapes alone
        net = their_net(torch, model.layers, shape).eval()
        with FlopCounterMode(display=False) as counter:
            y = net(torch.zeros(1, shape[-1], *shape[:-1]))
    own = count(model, shape)
    assert tuple(y.shape[1:]) == model.shapes(shape)[-1]
    assert sum(one.numel() for one in net.parameters()) == own.parameters
    assert counter.get_total_flops() == 2 * own.macs
