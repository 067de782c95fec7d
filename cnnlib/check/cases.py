"""Define the cases that check a backend. They compare every operation of training with NumPy in float64.

A case is an operation on arrays of one size, and its gradients. It runs in all forms that training uses
(`compare.FORMS`). Most values are sums of n terms. The tolerance of a value is a few times sqrt(n) * u * (sum of the
terms' absolute values), where u is the relative error of one rounding. In any order of the terms, the rounding error of
the sum is smaller with probability near 1 (Higham and Mary, "A new approach to probabilistic rounding error analysis",
2019). Errors are given in units of the tolerance. On a correct backend, the largest error is therefore at most 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from cnnlib import ops
from cnnlib.check.case import LANES, Case, Expected
from cnnlib.config.schema import LaneNumbers, Optim
from cnnlib.spec.layers import MaxPool
from cnnlib.train.optim import optimizer

# Each reference follows the definition of its operation in plain NumPy, with loops over taps.


def normal(name: str, *shape: int) -> np.ndarray:
    """Return standard normal float32 values that depend only on `name` and `shape`."""
    return np.random.RandomState(sum(name.encode()) * 7919 % 2**32).normal(size=shape).astype(np.float32)


def bilinear(
    operation: str,
    size: str,
    function: Callable[..., jax.Array],
    x: np.ndarray,
    kernel: np.ndarray,
    value: Callable[..., np.ndarray],
    to_x: Callable[..., np.ndarray],
    to_kernel: Callable[..., np.ndarray],
) -> Case:
    """Return the case of an operation that is linear in each of its two arguments.

    `value`, `to_x` and `to_kernel` compute the exact result and gradients. They also compute the fields of `Expected`,
    which determine the tolerance. From absolute values they compute `magnitude`, from ones they compute `terms`, and
    from squares they compute the square of `spread`.
    """

    def reference(x: np.ndarray, kernel: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        parts = ((value, x, kernel), (to_x, gradient, kernel), (to_kernel, x, gradient))
        return [
            Expected(of(a, b), of(np.abs(a), np.abs(b)), of(np.ones_like(a), np.ones_like(b)), np.sqrt(of(a**2, b**2)))
            for of, a, b in parts
        ]

    return Case(operation, size, function, (x, kernel), reference, gradients=2)


def dense(rows: int, inputs: int, outputs: int) -> Case:
    """Return the case of a matrix product."""
    size = f"{rows}x{inputs} by {inputs}x{outputs}"
    return bilinear(
        "dense",
        size,
        lambda x, kernel: x @ kernel,
        normal(size, LANES, rows, inputs),
        normal(f"kernel {size}", LANES, inputs, outputs),
        lambda x, kernel: x @ kernel,
        lambda gradient, kernel: gradient @ kernel.T,
        lambda x, gradient: x.T @ gradient,
    )


class Taps(NamedTuple):
    """The geometry of a window over an array `(image, height, width, channel)`. References use it."""

    window: tuple[int, int]
    strides: int = 1
    dilation: int = 1
    padding: int = 0

    def places(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the number of output rows and columns."""
        rows, columns = (
            (n + 2 * self.padding - (k - 1) * self.dilation - 1) // self.strides + 1
            for n, k in zip(shape[1:3], self.window, strict=True)
        )
        return rows, columns

    def padded(self, x: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """Return the input with padding around it. All values of the padding are `fill`."""
        edge = (self.padding, self.padding)
        return np.pad(x, ((0, 0), edge, edge, (0, 0)), constant_values=fill)

    def each(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """Yield the row and the column of each tap, and the slices of the padded input that lie under the tap."""
        rows, columns = self.places(shape)
        for i in range(self.window[0]):
            for j in range(self.window[1]):
                first = i * self.dilation, j * self.dilation
                yield (
                    i,
                    j,
                    (
                        slice(None),
                        slice(first[0], first[0] + (rows - 1) * self.strides + 1, self.strides),
                        slice(first[1], first[1] + (columns - 1) * self.strides + 1, self.strides),
                    ),
                )

    def cropped(self, padded: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Remove the padding from `padded`. The result has the shape of the input."""
        p = self.padding
        return padded[:, p : p + shape[1], p : p + shape[2]]


def filtered(
    operation: str, x_shape: tuple[int, ...], features: int, taps: Taps, *, local: bool = False, signals: bool = False
) -> Case:
    """Return the case of a convolution. If `local` is true, it is the case of a local layer.

    If `signals` is true, the arrays have one spatial axis instead of two.
    """
    places, shape = taps.places(x_shape), (*taps.window, x_shape[-1], features)
    size = f"{'x'.join(map(str, x_shape))} by {'x'.join(map(str, shape))}"
    size += f" /{taps.strides}" * (taps.strides > 1) + f" dilated {taps.dilation}" * (taps.dilation > 1)
    letters = "nrcx,rcxf->nrcf" if local else "nrcx,xf->nrcf"
    inputs, outputs = letters.split("->")
    maps, weights = inputs.split(",")

    def tap(kernel: np.ndarray, i: int, j: int) -> np.ndarray:
        return kernel[:, :, i, j] if local else kernel[i, j]

    def value(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        padded = taps.padded(x)
        return sum((np.einsum(letters, padded[at], tap(kernel, i, j)) for i, j, at in taps.each(x.shape)), np.zeros(()))

    def to_x(gradient: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        back = np.zeros_like(taps.padded(np.zeros(x_shape)))
        for i, j, at in taps.each(x_shape):
            back[at] += np.einsum(f"{outputs},{weights}->{maps}", gradient, tap(kernel, i, j))
        return taps.cropped(back, x_shape)

    def to_kernel(x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        found, padded = np.zeros((*places, *shape) if local else shape), taps.padded(x)
        for i, j, at in taps.each(x.shape):
            tap(found, i, j)[...] = np.einsum(f"{maps},{outputs}->{weights}", padded[at], gradient)
        return found

    conv, unshared = (ops.conv1d, ops.local1d) if signals else (ops.conv2d, ops.local2d)
    operate: Callable[..., jax.Array] = functools.partial(
        unshared if local else conv,
        strides=taps.strides,
        dilation=taps.dilation,
        padding=taps.padding,
    )

    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if not signals:
            return operate(x, kernel)
        return operate(x[:, 0], kernel[0, :, 0] if local else kernel[0])[:, None]

    kernel = normal(f"kernel {size}", LANES, *(places if local else ()), *shape)
    case = bilinear(operation, size, function, normal(size, LANES, *x_shape), kernel, value, to_x, to_kernel)
    # In a local layer, the input gradient is a sum over taps, in the type of the input.
    return case._replace(sums_in_own_type=local)


def pooled(operation: str, x_shape: tuple[int, ...], taps: Taps) -> Case:
    """Return the case of `max_pool` or `avg_pool`. If several values are the largest, they share the gradient."""
    size = f"{'x'.join(map(str, x_shape))}, {taps.window[0]}x{taps.window[1]} /{taps.strides}"

    def reference(x: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        under = np.stack([x[at] for _, _, at in taps.each(x.shape)])
        if operation == "max_pool":
            y = under.max(axis=0)
            share = (under == y) / (under == y).sum(axis=0)
            value = Expected(y, np.zeros_like(y), 0.0)
        else:
            y, share = under.mean(axis=0), np.full_like(under, 1 / len(under))
            value = Expected(y, np.abs(under).mean(axis=0), len(under))
        back, magnitude = np.zeros_like(x), np.zeros_like(x)
        for part, (_, _, at) in zip(share, taps.each(x.shape), strict=True):
            back[at] += part * gradient
            magnitude[at] += part * np.abs(gradient)
        return [value, Expected(back, magnitude, len(under))]

    function = functools.partial(getattr(ops, operation), window_shape=taps.window, strides=taps.strides)
    return Case(operation, size, function, (normal(size, LANES, *x_shape),), reference, 1, sums_in_own_type=True)


def filtered_and_pooled(x_shape: tuple[int, ...], features: int, taps: Taps, pool: MaxPool) -> Case:
    """Return the case of a convolution followed by max pooling.

    The arguments are whole numbers. Therefore rounding cannot change which value of a window is the largest. The case
    runs only in float32. In bfloat16, convolution and pooling are two operations, and each operation has its own cases.
    """
    conv = filtered("conv2d", x_shape, features, taps)
    map_shape = (x_shape[0], *taps.places(x_shape), features)
    window, strides = pool.window(map_shape[1:]).size, pool.window(map_shape[1:]).strides
    maximum = pooled("max_pool", map_shape, Taps((window[0], window[1]), strides[0]))

    def reference(x: np.ndarray, kernel: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        y, *_ = conv.reference(x, kernel, np.zeros(map_shape))
        largest, back = maximum.reference(y.value, gradient)
        _, to_x, to_kernel = conv.reference(x, kernel, back.value)
        return [Expected(largest.value, np.zeros_like(largest.value), 0.0), to_x, to_kernel]

    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return ops.conv2d(x, kernel, strides=taps.strides, dilation=taps.dilation, padding=taps.padding, pool=pool)

    x, kernel = np.round(conv.arguments[0]), np.sign(conv.arguments[1])
    size = f"{conv.size}, {maximum.size}"
    return Case("conv2d, max_pool", size, function, (x, kernel), reference, 2, has_bfloat16=False)


def normalised(x_shape: tuple[int, ...]) -> Case:
    """Return the case of batch normalisation and its gradients (Ioffe and Szegedy 2015, section 3)."""
    size, epsilon = "x".join(map(str, x_shape)), 1e-5
    count, channels = float(np.prod(x_shape[:-1])), x_shape[-1]
    axes = tuple(range(len(x_shape) - 1))

    def reference(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        mean, deviation = x.mean(axes), np.sqrt(x.var(axes) + epsilon)
        unit = (x - mean) / deviation
        along = (gradient * unit).mean(axes)
        y = unit * scale + bias
        back = scale / deviation * (gradient - gradient.mean(axes) - unit * along)
        largest = np.abs(unit).max(axes)
        sizes = np.abs(gradient).mean(axes), np.abs(gradient * unit).mean(axes)
        spread = np.abs(scale) / deviation * (np.abs(gradient) + sizes[0] + np.abs(unit) * sizes[1])
        return [
            Expected(y, np.abs(unit * scale) + np.abs(scale) + np.abs(bias), count),
            Expected(back, spread, count),
            Expected((gradient * unit).sum(axes), count * (sizes[0] * (1 + largest) + sizes[1]), count),
            Expected(gradient.sum(axes), count * sizes[0], count),
        ]

    x = normal(size, LANES, *x_shape)
    scale, bias = 1 + normal(f"scale {size}", LANES, channels), normal(f"bias {size}", LANES, channels)
    function = lambda x, scale, bias: ops.batch_norm(x, scale, bias, epsilon)[0]  # noqa: E731
    return Case("batch_norm", size, function, (x, scale, bias), reference, 3, has_bfloat16=False)


def activated(rows: int, units: int) -> Case:
    """Return the case of adding a bias and applying activations. The bias gradient is a sum over all rows."""
    size = f"{rows}x{units}"

    def reference(x: np.ndarray, bias: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        y = np.tanh(np.maximum(x + bias, 0))
        back, most = gradient * (1 - y**2) * (x + bias > 0), np.abs(gradient)
        return [Expected(y, np.abs(y), 2), Expected(back, most, 2), Expected(back.sum(0), most.sum(0), rows)]

    # Multiples of 1/8 and 1/16 make `x + bias` exact in bfloat16. `x + bias` is never zero, because the gradient of
    # relu at zero is ambiguous.
    x, bias = np.round(8 * normal(size, LANES, rows, units)) / 8, normal(f"bias {size}", LANES, units)
    arguments = (np.clip(x, -3, 3), (np.clip(np.round(8 * bias), -7, 7) + 0.5).astype(np.float32) / 8)
    function = lambda x, bias: jnp.tanh(jax.nn.relu(x + bias[None]))  # noqa: E731
    return Case("bias, relu, tanh", size, function, arguments, reference, 2, sums_in_own_type=True)


def summed(rows: int) -> Case:
    """Return the case of the sum of squares of `kernel @ row` for each row. Compilers fuse the product and the sum."""
    size = f"{rows} rows of 3"
    kernel = normal(f"kernel {size}", 3, 3)

    def reference(x: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        y, most = x @ kernel.T, np.abs(x) @ np.abs(kernel.T)
        spread = 2 * (most * np.sqrt(x**2 @ kernel.T**2)).sum(1)
        return [Expected((y**2).sum(1), (most**2).sum(1), 9.0, spread)]

    function = jax.vmap(lambda row: jnp.sum((kernel @ row) ** 2))
    arguments = (normal(size, LANES, rows, 3),)
    return Case("sum of squared products", size, function, arguments, reference, 0, has_bfloat16=False)


def loss(rows: int, classes: int) -> Case:
    """Return the case of softmax cross-entropy with smoothed labels, one value per example."""
    size, smoothing = f"{rows} examples, {classes} classes", 0.1

    def reference(logits: np.ndarray, labels: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        shifted = logits - logits.max(1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        targets = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
        back = gradient[:, None] * (np.exp(logs) - targets)
        return [
            Expected(-(targets * logs).sum(1), np.abs(logs).sum(1), classes),
            Expected(back, np.abs(gradient)[:, None] * (1 + np.abs(logits)) * 2, classes),
        ]

    def function(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)
        return jnp.asarray(optax.softmax_cross_entropy(logits, targets))

    labels = np.random.RandomState(rows).randint(0, classes, (LANES, rows)).astype(np.int32)
    arguments = (normal(size, LANES, rows, classes), labels)
    return Case("cross-entropy", size, function, arguments, reference, 1, has_bfloat16=False)


STEPS, RATE, MOMENTUM, DECAY, ADAM_BETA, ADAM_EPSILON = 3, 0.05, 0.9, 0.01, 0.999, 1e-8


def updated(name: Literal["sgd", "adam", "adamw"], size: int) -> Case:
    """Return the case of three optimiser steps. Each step has the same gradient.

    The reference follows Kingma and Ba (2015) for Adam, and Loshchilov and Hutter (2019) for AdamW.
    """

    def reference(weights: np.ndarray, slope: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        found, first, second = weights, np.zeros_like(weights), np.zeros_like(weights)
        for step in range(1, STEPS + 1):
            along = slope + (0 if name == "adamw" else DECAY) * found
            if name == "sgd":
                first = MOMENTUM * first + along
                found = found - RATE * first
                continue
            first = MOMENTUM * first + (1 - MOMENTUM) * along
            second = ADAM_BETA * second + (1 - ADAM_BETA) * along**2
            change = first / (1 - MOMENTUM**step)
            change = change / (np.sqrt(second / (1 - ADAM_BETA**step)) + ADAM_EPSILON)
            found = found - RATE * (change + (DECAY * found if name == "adamw" else 0))
        return [Expected(found, np.abs(weights) + STEPS * RATE * (STEPS * np.abs(slope) + 10), 20.0)]

    def function(weights: jax.Array, slope: jax.Array) -> jax.Array:
        numbers = LaneNumbers(0, 0, RATE, MOMENTUM, DECAY, 0.0, 0.0, 0.0)
        rule = optimizer(Optim(name), numbers, total_steps=STEPS)

        def step(_: int, model: PyTree) -> PyTree:
            update, state = rule.update(slope, model[1], model[0])
            return optax.apply_updates(model[0], update), state

        return jnp.asarray(jax.lax.fori_loop(0, STEPS, step, (weights, rule.init(weights)))[0])

    arguments = (normal(f"{name} {size}", LANES, size), 1 + np.abs(normal(f"slope {name}", LANES, size)))
    return Case(f"{name} step", f"{size} weights", function, arguments, reference, 0, has_bfloat16=False)


def gathered(count: int, batch: int) -> Case:
    """Return the case that takes a batch of images by index and converts them to float32. The result must be exact."""
    size = f"{batch} of {count} images"

    def reference(images: np.ndarray, index: np.ndarray, gradient: np.ndarray) -> list[Expected]:
        y = images[index].astype(np.float64)
        return [Expected(y, np.zeros_like(y), 0.0)]

    generator = np.random.RandomState(count)
    images = generator.randint(0, 256, (LANES, count, 4, 4, 1)).astype(np.uint8)
    index = generator.randint(0, count, (LANES, batch)).astype(np.int32)
    function = lambda images, index: images[index].astype(jnp.float32)  # noqa: E731
    return Case("gather", size, function, (images, index), reference, 0, has_bfloat16=False)


@functools.cache
def cases() -> tuple[Case, ...]:
    """Return all cases. Some sizes are above the limits at which libraries divide the work, such as 32,768 rows."""
    images, signals = (8, 12, 12, 3), (8, 1, 40, 3)
    return (
        dense(7, 5, 3),
        dense(250, 784, 300),
        dense(32_769, 3, 3),
        filtered("conv2d", (128, 28, 28, 1), 6, Taps((5, 5), padding=2)),
        filtered("conv2d", (16, 14, 14, 16), 33, Taps((3, 3))),
        filtered("conv2d", images, 4, Taps((3, 2), strides=2, padding=1)),
        filtered("conv2d", images, 4, Taps((3, 3), dilation=2)),
        filtered("conv1d", (100, 1, 40, 1), 25, Taps((1, 5), strides=2), signals=True),
        filtered("conv1d", signals, 4, Taps((1, 3), dilation=2), signals=True),
        filtered("local2d", (128, 12, 12, 2), 6, Taps((5, 5)), local=True),
        filtered("local2d", images, 4, Taps((3, 3), strides=2, padding=1), local=True),
        filtered("local1d", (100, 1, 40, 1), 8, Taps((1, 5), strides=2), local=True, signals=True),
        filtered_and_pooled((32, 28, 28, 1), 6, Taps((5, 5), padding=2), MaxPool(2)),
        filtered_and_pooled((16, 14, 14, 6), 16, Taps((5, 5)), MaxPool(3, strides=2)),
        pooled("max_pool", (64, 24, 24, 6), Taps((2, 2), strides=2)),
        pooled("max_pool", images, Taps((3, 3), strides=2)),
        pooled("avg_pool", (64, 24, 24, 6), Taps((2, 2), strides=2)),
        normalised((7, 3)),
        normalised((64, 24, 24, 3)),
        activated(7, 5),
        activated(32_769, 4),
        summed(7),
        summed(32_769),
        loss(100, 10),
        loss(32_769, 10),
        updated("sgd", 1000),
        updated("adam", 1000),
        updated("adamw", 1000),
        gathered(40_000, 100),
    )


@functools.cache
def quick_cases() -> tuple[Case, ...]:
    """Return one small case per operation. All cases together take less than a second."""
    return (
        dense(250, 784, 30),
        filtered("conv2d", (32, 12, 12, 1), 6, Taps((5, 5), padding=2)),
        filtered("conv1d", (32, 1, 40, 1), 8, Taps((1, 5), strides=2), signals=True),
        filtered("local2d", (32, 8, 8, 2), 6, Taps((5, 5)), local=True),
        filtered_and_pooled((32, 12, 12, 1), 6, Taps((5, 5), padding=2), MaxPool(2)),
        pooled("max_pool", (16, 12, 12, 6), Taps((2, 2), strides=2)),
        normalised((16, 12, 12, 3)),
        activated(100, 10),
        summed(32_769),
        loss(100, 10),
        updated("sgd", 100),
        updated("adamw", 100),
        gathered(1000, 100),
    )
