"""What compilers say of lanes on accelerators that are not there: ours, and stock Flax vectorised or one at a time.

Rows go to a file as they are made (`--rows`), and rows that are there are not made again: a whole table takes hours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from benchmarks.timing import Table
from cnnlib import models, ops, programs, train
from cnnlib.aot.compiling import compile_for, devices, on
from cnnlib.aot.hardware import parse_target
from cnnlib.architectures import ARCHITECTURES
from cnnlib.config import Augment, LaneNumbers, Optim
from cnnlib.spec import Model, PerAxis, Shape, parse_model
from cnnlib.train import Examples, Recipe

BATCH, EXAMPLES = 100, 3500
"""Of `fc_vs_conv`."""
FASHION = (
    "conv:32@3:nobias norm relu conv:32@3:nobias norm relu max:2 conv:64@3:nobias norm relu max:2 "
    "dense:128:nobias norm relu dense:classes"
)
NETS: dict[str, tuple[Callable[[], Model], Shape]] = {
    "lenet_300_100": (lambda: ARCHITECTURES.get("lenet_300_100"), (28, 28, 1)),
    "lenet5": (lambda: ARCHITECTURES.get("lenet5"), (28, 28, 1)),
    "two_conv": (lambda: ARCHITECTURES.get("two_conv"), (28, 28, 1)),
    "mnist1d_cnn": (lambda: ARCHITECTURES.get("mnist1d_cnn"), (40, 1)),
    "local_lenet5": (lambda: ARCHITECTURES.get("lenet5").local(), (28, 28, 1)),
    "normed": (lambda: parse_model(FASHION), (28, 28, 1)),
}
FORMS = ("ours", "stock, all lanes at once", "stock, one lane at a time")


DIMENSIONS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


def each_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """Repeat a number per axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def pairs(padding: Any, axes: int) -> Any:
    """Return padding as JAX wants it: a name, or before and after per axis."""
    if isinstance(padding, str):
        return padding
    return [(n, n) if isinstance(n, int) else tuple(n) for n in each_axis(padding, axes)]


def stock_convolution(
    x: jax.Array, kernel: jax.Array, *, strides: PerAxis = 1, padding: Any = "SAME", dilation: PerAxis = 1
) -> jax.Array:
    """Convolve as Flax's `nn.Conv` does."""
    axes = x.ndim - 2
    each, pads = [each_axis(n, axes) for n in (strides, dilation)], pairs(padding, axes)
    return lax.conv_general_dilated(x, kernel, each[0], pads, None, each[1], DIMENSIONS[axes])


def stock_local(
    x: jax.Array, kernel: jax.Array, *, strides: PerAxis = 1, padding: Any = "SAME", dilation: PerAxis = 1
) -> jax.Array:
    """Compute a local layer as Flax's `nn.ConvLocal` does."""
    axes = x.ndim - 2
    each, pads = [each_axis(n, axes) for n in (strides, dilation)], pairs(padding, axes)
    flat = jnp.moveaxis(kernel, -2, axes).reshape(*kernel.shape[:axes], -1, kernel.shape[-1])
    window = kernel.shape[axes : 2 * axes]
    return lax.conv_general_dilated_local(
        x, flat, each[0], pads, window, rhs_dilation=each[1], dimension_numbers=DIMENSIONS[axes]
    )


def stock_max_pool(x: jax.Array, window: PerAxis, strides: PerAxis | None = None, padding: Any = "VALID") -> jax.Array:
    """Pool by Flax's `nn.max_pool`."""
    each = [each_axis(n, x.ndim - 2) for n in (window, strides or window)]
    return nn.max_pool(x, each[0], each[1], padding)


@contextlib.contextmanager
def stock_operations() -> Iterator[None]:
    """Inside, networks run on stock operations; they still pool before bias and activation."""
    exchanged = {
        "conv2d": stock_convolution,
        "conv1d": stock_convolution,
        "local2d": stock_local,
        "local1d": stock_local,
        "max_pool": stock_max_pool,
    }
    before = {name: getattr(ops, name) for name in exchanged}
    try:
        for name, function in exchanged.items():
            setattr(models.ops, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(models.ops, name, function)


def row(net: str, lanes: int, dtype: str, hardware: str, form: str) -> dict[str, Any]:
    """Compile one epoch, and return what its compiler says per lane-step."""
    target = parse_target(hardware)
    make, shape = NETS[net]
    model = make().with_num_classes(10)
    recipe = Recipe(models.network(model, jnp.dtype(dtype)), shape, Optim("adam"), Augment(), BATCH, epochs=1)
    struct: Any = jax.ShapeDtypeStruct
    seeds = ("seed", "order_seed")
    numbers = LaneNumbers(
        *(struct((lanes,), jnp.uint32 if name in seeds else jnp.float32) for name in LaneNumbers._fields)
    )
    kind, channel = jnp.uint8 if len(shape) == 3 else jnp.float32, struct((shape[-1],), jnp.float32)
    examples = Examples(struct((EXAMPLES, *shape), kind), struct((EXAMPLES,), jnp.int32), channel, channel)
    states = jax.eval_shape(train.over_lanes(train.initialize(recipe), 1), numbers)
    platform = "tpu" if target.platform == "tpu" else "gpu"
    at_a_time = {
        "ours": programs.preferred_at_a_time(model.connectivity, shape, lanes, platform),
        "stock, all lanes at once": lanes,
        "stock, one lane at a time": 1,
    }[form]
    epoch = jax.jit(train.over_lanes(train.epoch(recipe), at_a_time, 2), donate_argnums=0)
    arguments = on(devices(target)[0], (states, numbers, examples))
    with contextlib.nullcontext() if form == "ours" else stock_operations():
        report = compile_for(epoch, arguments, target, None if form == "ours" else "xla")
    steps = lanes * (EXAMPLES // BATCH)
    return {
        "cycles_per_lane_step": None if report.cycles is None else round(report.cycles / steps),
        "microseconds_per_lane_step": 1e6 * report.seconds / steps,
        "bytes_per_lane_step": round(report.bytes / steps),
        "temporary_bytes": report.temporary_bytes,
        "compile_seconds": round(report.compile_seconds, 1),
        "lanes_at_a_time": at_a_time,
    }


def calibration(hardware: str) -> list[dict[str, Any]]:
    """Compare estimates of known work with its time at the published peak and bandwidth."""
    target = parse_target(hardware)
    found = []
    for size in (4096, 8192, 16384):
        a = on(devices(target)[0], jax.ShapeDtypeStruct((size, size), jnp.bfloat16))
        report = compile_for(jax.jit(jnp.matmul), (a, a), target)
        found.append(("product", f"{size} x {size}", report.seconds, 2 * size**3 / target.chip.peak_flops))
    for gib in (0.25, 1, 4):
        a = on(devices(target)[0], jax.ShapeDtypeStruct((int(gib * 2**28) // 1024, 1024), jnp.float32))
        report = compile_for(jax.jit(lambda a: a + 1), (a,), target)
        found.append(("copy", f"{gib} GiB", report.seconds, 2 * gib * 2**30 / target.chip.bandwidth))
    return [
        {
            "calibration": f"{hardware}, {what} {size}",
            "estimated_ms": 1e3 * own,
            "published_ms": 1e3 * known,
            "share_of_published": known / own,
        }
        for what, size, own, known in found
    ]


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that earlier calls have made."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(
    nets: Sequence[str], lanes: Sequence[int], dtypes: Sequence[str], hardware: Sequence[str], path: Path
) -> Iterator[Table]:
    """Make the rows that are missing, writing each as it is made, and yield a table per hardware and dtype."""
    known = {tuple(one["key"]): one for one in kept_rows(path)}
    for target, dtype in itertools.product(hardware, dtypes):
        rows = []
        for net, count in itertools.product(nets, lanes):
            found = {}
            for form in FORMS:
                key = (net, count, dtype, target, form)
                if key not in known:
                    try:
                        values = row(*key)
                    except jax.errors.JaxRuntimeError as error:
                        values = {"failed": str(error).splitlines()[0]}
                    known[key] = {"key": key, "jax": jax.__version__, **values}
                    with path.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
                found[form] = known[key].get("cycles_per_lane_step") or known[key].get("microseconds_per_lane_step")
            stock = [found[form] for form in FORMS[1:] if found[form] is not None]
            times = found["ours"] / min(stock) if stock and found["ours"] is not None else None
            rows.append({"net": net, "lanes": str(count), **found, "ours to the better stock form": times})
        yield Table(f"cycles (TPU) or microseconds (GPU) per lane-step, {target}, {dtype}, batch {BATCH}", rows)
