"""Time operations and their gradients, in cnnlib and stock JAX: alone, in a loop, and with eight kernels at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from benchmarks.timing import Contestant, Table, blocked, interleaved, matrix_product
from cnnlib import ops
from cnnlib.ops import kernels

CONVOLUTIONS = {
    # name: height = width, channels, features, kernel, padding
    "LeNet-5 c1, 28x28x1 -> 6, 5x5": (28, 1, 6, 5, "SAME"),
    "LeNet-5 c3, 14x14x6 -> 16, 5x5": (14, 6, 16, 5, "VALID"),
    "two-conv 1, 28x28x1 -> 32, 3x3": (28, 1, 32, 3, "SAME"),
    "two-conv 2, 14x14x32 -> 64, 3x3": (14, 32, 64, 3, "SAME"),
}
LOCALS = {
    # name: height = width, channels, features, kernel, stride, padding
    "local LeNet-5 c1, 28x28x1 -> 6, 5x5": (28, 1, 6, 5, 1, 2),
    "local LeNet-5 c3, 14x14x6 -> 16, 5x5": (14, 6, 16, 5, 1, 0),
    "local two-conv 1, 28x28x1 -> 32, 3x3": (28, 1, 32, 3, 1, 1),
    "local two-conv 2, 14x14x32 -> 64, 3x3": (14, 32, 64, 3, 1, 1),
    "local S(8), 32x32x3 -> 8, 9x9 in steps of 2": (32, 3, 8, 9, 2, 4),
}
POOLS = {"LeNet-5 pool 1, 28x28x6": (28, 6), "two-conv pool 1, 28x28x32": (28, 32)}
REPEATS, LANES = 4, 8
Operation = Callable[..., Any]


def stock_conv(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
    """Compute a convolution with JAX's own operation."""
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def stock_local(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Compute a local layer with JAX's own operation. One axis of its kernel holds channels, then taps."""
    flat = kernel.reshape(*kernel.shape[:2], -1, kernel.shape[-1])
    pads = ((padding, padding),) * 2
    spec = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated_local(x, flat, (stride,) * 2, pads, kernel.shape[2:4], dimension_numbers=spec)


def parts(operation: Operation) -> dict[str, Operation]:
    """Split an operation into forward pass and gradients. Each is a function of (x, kernel, gradient of the output)."""
    return {
        "forward": lambda x, kernel, _: operation(x, kernel),
        "input gradient": lambda x, kernel, g: jax.vjp(lambda x: operation(x, kernel), x)[1](g)[0],
        "weight gradient": lambda x, kernel, g: jax.vjp(lambda k: operation(x, k), kernel)[1](g)[0],
    }


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Inside this context, trace operations with the CPU kernels that `implementation` names."""
    before = os.environ.get("CNNLIB_KERNELS", "auto")
    os.environ["CNNLIB_KERNELS"] = implementation
    try:
        yield
    finally:
        os.environ["CNNLIB_KERNELS"] = before


def implementations() -> list[str]:
    """Return cnnlib's implementations: XLA's kernels, and on a CPU also kernels.cc if it compiles."""
    if jax.devices()[0].platform != "cpu":
        return ["xla"]
    return ["xla"] if kernels.register() else ["native", "xla"]


def three_ways(name: str, operation: Operation, x: Any, kernel: Any, gradient: Any) -> list[Contestant]:
    """Compile an operation alone, in `lax.map`, and under `vmap` over `LANES` kernels. Call it inside `using`."""
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * REPEATS), (x, kernel, gradient))
    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf] * LANES), (x, kernel, gradient))
    alone = jax.jit(operation).lower(x, kernel, gradient).compile()
    looped = jax.jit(lambda operands: lax.map(lambda one: operation(*one), operands)).lower(many).compile()
    vmapped = jax.jit(jax.vmap(operation)).lower(*lanes).compile()
    return [
        Contestant(f"{name}: alone", blocked(alone, x, kernel, gradient)),
        Contestant(f"{name}: in a loop", blocked(looped, many), REPEATS),
        Contestant(f"{name}: vmap", blocked(vmapped, *lanes), LANES),
    ]


def measure(batch_size: int, rounds: int, only: str = "") -> list[Table]:
    """Return one table for each operation whose name contains the text `only`.

    A table has the milliseconds per call: alone, in a loop and under `vmap`. If the operation is not a pooling, the
    table also has a rate: that of the operation in a loop, divided by that of the matrix product.
    """
    tables = []
    random = np.random.RandomState(0)
    for name, (size, channels, features, k, padding) in CONVOLUTIONS.items():
        if only not in name:
            continue
        x = jnp.asarray(random.normal(size=(batch_size, size, size, channels)), jnp.float32)
        kernel = jnp.asarray(random.normal(size=(k, k, channels, features)), jnp.float32)
        y = jax.eval_shape(lambda x, kernel, padding=padding: stock_conv(x, kernel, padding), x, kernel)
        gradient = jnp.asarray(random.normal(size=y.shape), jnp.float32)
        bodies: dict[str, Operation] = {}
        for implementation in implementations():
            bodies[f"cnnlib, {implementation}"] = lambda x, w, padding=padding: ops.conv2d(x, w, padding=padding)
        bodies["stock lax"] = lambda x, w, padding=padding: stock_conv(x, w, padding)
        tables.append(race(name, bodies, x, kernel, gradient, rounds, 2.0 * y.size * k * k * channels))
    for name, (size, channels, features, k, stride, padding) in LOCALS.items():
        if only not in name:
            continue
        positions = (size + 2 * padding - k) // stride + 1
        x = jnp.asarray(random.normal(size=(batch_size, size, size, channels)), jnp.float32)
        kernel = jnp.asarray(random.normal(size=(positions, positions, k, k, channels, features)), jnp.float32)
        gradient = jnp.asarray(random.normal(size=(batch_size, positions, positions, features)), jnp.float32)
        arguments = {"strides": stride, "padding": padding}
        bodies = {
            f"cnnlib, {each}": lambda x, w, arguments=arguments: ops.local2d(x, w, **arguments)
            for each in implementations()
        }
        bodies["stock lax"] = lambda x, w, stride=stride, padding=padding: stock_local(x, w, stride, padding)
        tables.append(race(name, bodies, x, kernel, gradient, rounds, 2.0 * gradient.size * k * k * channels))
    for name, (size, channels) in POOLS.items():
        if only not in name:
            continue
        x = jnp.asarray(random.normal(size=(batch_size, size, size, channels)), jnp.float32)
        gradient = jnp.asarray(random.normal(size=(batch_size, size // 2, size // 2, channels)), jnp.float32)
        bodies = {f"cnnlib, {each}": lambda x, _: ops.max_pool(x, 2) for each in implementations()}
        bodies["stock flax"] = lambda x, _: nn.max_pool(x, (2, 2), strides=(2, 2))
        tables.append(race(name, bodies, x, jnp.zeros(()), gradient, rounds, None))
    return tables


def race(
    title: str, bodies: dict[str, Operation], x: Any, kernel: Any, gradient: Any, rounds: int, operations: float | None
) -> Table:
    """Time the forward pass and the gradients of every implementation in all three ways. Contestants run in turn."""
    yardstick, product = matrix_product()
    entries, labels = [yardstick], []
    for name, body in bodies.items():
        with using(name.removeprefix("cnnlib, ") if name.startswith("cnnlib") else "auto"):
            for part, operation in parts(body).items():
                if part == "weight gradient" and operations is None:
                    continue  # pooling has no weights
                labels.append(f"{part}, {name}")
                entries += three_ways(labels[-1], operation, x, kernel, gradient)
    seconds = interleaved(entries, rounds)
    rate = product / float(np.median(seconds[yardstick.name]))
    rows = []
    for label in sorted(labels, key=lambda text: text.split(",")[0]):
        ways = {way: float(np.median(seconds[f"{label}: {way}"])) for way in ("alone", "in a loop", "vmap")}
        row: dict[str, Any] = {"ms per call": label, **{way: 1e3 * value for way, value in ways.items()}}
        row[f"vmap of {LANES}, a kernel"] = row.pop("vmap")
        if operations is not None:
            row["share in a loop"] = operations / ways["in a loop"] / rate
        rows.append(row)
    return Table(f"{title}, median of {rounds} rounds; matrix product {rate / 1e9:.0f} GFLOP/s", rows)
