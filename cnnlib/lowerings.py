"""What each primitive runs as on each platform: a CPU, a GPU, a TPU.

A lowering is a function of the primitive's operands, written in JAX, so that any of them runs on any platform: tests
force those of GPUs and TPUs on a CPU (`CNNLIB_KERNELS=gpu`, `=tpu`). All operands carry lanes, models of a population
that are trained together: `x` is `(lane, image, height, width, channel)`.

- A CPU takes all lanes in kernels.cc, or one lane after another in XLA's operations. A convolution and the max pooling
  behind it are one operation there.
- A GPU takes the lanes of a convolution as the groups of one convolution.
- A TPU does the same with several lanes. A lane alone runs in blocks of neighbouring outputs: see `Blocks`.

docs/accelerators.md has the measurements behind these choices.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cnnlib import kernels
from cnnlib.geometry import Correlation, Pair, Pooling, im2col, taps_of, wide_type

FEW_CHANNELS = 4
"""Below this many input channels, so for grey and colour images, XLA's CPU convolutions lose to im2col."""
FEW_IMAGES = 8
"""Below this many the vectors of kernels.cc, which hold as many images, are mostly empty."""


# How lanes run.


def one_after_another(one: Callable[..., Array], *operands: Array) -> Array:
    """Compute `one` lane at a time. XLA's CPU runs batched convolutions and products slower."""
    if operands[0].shape[0] == 1:
        return one(*(operand[0] for operand in operands))[None]
    result: Array = lax.map(lambda lane: one(*lane), operands)
    return result


def together(one: Callable[..., Array], *operands: Array) -> Array:
    """Compute all lanes at once, with `jax.vmap` of `one`."""
    if operands[0].shape[0] == 1:
        return one(*(operand[0] for operand in operands))[None]
    return jax.vmap(one)(*operands)


# Shapes of results. Each takes the static arguments of its primitive.


def correlate_shape(x: Any, kernel: Any, *, correlation: Correlation, form: str) -> tuple[int, ...]:
    """Return `(lane, image, output_height, output_width, feature)`; raise TypeError for operands that do not fit."""
    if x.shape[0] != kernel.shape[0] or x.shape[-1] != kernel.shape[-2]:
        raise TypeError(f"x {x.shape} and kernel {kernel.shape} differ in lanes or channels")
    return (*x.shape[:2], *correlation.output_size(x.shape[2:4], kernel.shape[1:3]), kernel.shape[-1])


def input_gradient_shape(
    gradient: Any, kernel: Any, *, size: Pair, correlation: Correlation, form: str
) -> tuple[int, ...]:
    """Return `(lane, image, height, width, channel)`; raise TypeError for operands that do not fit."""
    if gradient.shape[0] != kernel.shape[0] or gradient.shape[-1] != kernel.shape[-1]:
        raise TypeError(f"gradient {gradient.shape} and kernel {kernel.shape} differ in lanes or features")
    return (*gradient.shape[:2], *size, kernel.shape[-2])


def kernel_gradient_shape(
    x: Any, gradient: Any, *, window: Pair, correlation: Correlation, form: str
) -> tuple[int, ...]:
    """Return `(lane, kernel_height, kernel_width, channel, feature)`."""
    return (x.shape[0], *window, x.shape[-1], gradient.shape[-1])


def local_shape(x: Any, kernel: Any, *, correlation: Correlation, form: str) -> tuple[int, ...]:
    """Return `(lane, image, row, column, feature)`; raise TypeError for operands that do not fit."""
    positions = correlation.output_size(x.shape[2:4], kernel.shape[3:5])
    if (x.shape[0], *positions, x.shape[-1]) != (*kernel.shape[:3], kernel.shape[-2]):
        raise TypeError(f"x {x.shape} and kernel {kernel.shape} differ in lanes, positions or channels")
    return (*x.shape[:2], *positions, kernel.shape[-1])


def local_input_shape(
    gradient: Any, kernel: Any, *, size: Pair, correlation: Correlation, form: str
) -> tuple[int, ...]:
    """Return `(lane, image, height, width, channel)`."""
    return (*gradient.shape[:2], *size, kernel.shape[-2])


def local_kernel_shape(x: Any, gradient: Any, *, window: Pair, correlation: Correlation, form: str) -> tuple[int, ...]:
    """Return `(lane, row, column, kernel_height, kernel_width, channel, feature)`."""
    return (x.shape[0], *gradient.shape[2:4], *window, x.shape[-1], gradient.shape[-1])


def pooled_shape(x: Any, *_: Any, pooling: Pooling, form: str) -> tuple[int, ...]:
    """Return `(image, row, column, channel)`."""
    return (x.shape[0], *pooling.output_size(x.shape[1:3]), x.shape[3])


# Correlations.


def cropped(x: Array, correlation: Correlation) -> tuple[Array, Correlation]:
    """Crop images where padding is negative, and return the correlation of what is left.

    XLA's CPU compiler reads beyond images where it crops on one side and pads on the other (openxla/xla issue 48713;
    seen with jaxlib 0.7.2 and 0.10.2, in float32 and bfloat16). Gradients crop where an image has more padding than a
    kernel covers.
    """
    edges, padding = [(0, 0, 0)], []
    for n, pair, spread in zip(x.shape[1:3], correlation.padding, correlation.x_dilation, strict=True):
        # In values of the image, rounded up; `spread` steps each.
        low, high = (-(min(side, 0) // spread) for side in pair)
        low = min(low, n)
        high = min(high, n - low)
        edges.append((-low, -high, 0))
        padding.append((pair[0] + low * spread, pair[1] + high * spread))
    if not any(map(any, edges)):
        return x, correlation
    x = lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])
    return x, correlation._replace(padding=(padding[0], padding[1]))


def stock(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute one lane by XLA's own convolution."""
    x, correlation = cropped(x, correlation)
    return lax.conv_general_dilated(x, kernel, *correlation, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute one lane by XLA's own convolution; a signal, which has a height of 1, by one over a single axis.

    Under `jax.vmap` a TPU takes a seventh fewer cycles for the single axis (MNIST-1D's CNN, 5 lanes).
    """
    padding, dilation = correlation.padding, correlation.x_dilation
    if x.shape[1] != 1 or kernel.shape[0] != 1 or padding[0] != (0, 0) or dilation[0] != 1:
        return stock(x, kernel, correlation)
    x, correlation = cropped(x, correlation)
    padding = correlation.padding
    y = lax.conv_general_dilated(
        x[:, 0],
        kernel[0],
        correlation.strides[1:],
        padding[1:],
        dilation[1:],
        correlation.kernel_dilation[1:],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    return y[:, None]


def convolution_input_gradient(gradient: Array, kernel: Array, size: Pair, correlation: Correlation) -> Array:
    """Compute one lane by the transpose of `convolution` in its input.

    Padding beyond what the kernel covers is apart from the convolution, whose transpose would crop (see `cropped`).
    """
    spans = [(k - 1) * d for k, d in zip(kernel.shape[:2], correlation.kernel_dilation, strict=True)]
    spare, kept = [], []
    for pair, span, spread in zip(correlation.padding, spans, correlation.x_dilation, strict=True):
        low, high = (max(0, side - span) // spread for side in pair)
        spare.append((low, high, 0))
        kept.append((pair[0] - low * spread, pair[1] - high * spread))
    inner = correlation._replace(padding=(kept[0], kept[1]))

    def forward(x: Array) -> Array:
        if any(map(any, spare)):
            x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spare, (0, 0, 0)])
        return convolution(x, kernel, inner)

    like = jax.ShapeDtypeStruct((gradient.shape[0], *size, kernel.shape[-2]), gradient.dtype)
    (result,) = jax.linear_transpose(forward, like)(gradient)
    return jnp.asarray(result)


def convolution_kernel_gradient(x: Array, gradient: Array, window: Pair, correlation: Correlation) -> Array:
    """Compute one lane by the transpose of `convolution` in its kernel."""
    like = jax.ShapeDtypeStruct((*window, x.shape[-1], gradient.shape[-1]), x.dtype)
    (result,) = jax.linear_transpose(lambda kernel: convolution(x, kernel, correlation), like)(gradient)
    return jnp.asarray(result)


def contract(patches: Array, gradient: Array) -> Array:
    """Sum `patches[..., i] * gradient[..., j]` over images and positions, accumulating in float32 at least."""
    axes = tuple(range(gradient.ndim - 1))
    return lax.dot_general(
        patches, gradient, ((axes, axes), ((), ())), preferred_element_type=wide_type(gradient.dtype)
    )


def _attributes(correlation: Correlation) -> dict[str, tuple[int, ...]]:
    return {
        "strides": correlation.strides,
        "low": tuple(low for low, _ in correlation.padding),
        "x_dilation": correlation.x_dilation,
        "kernel_dilation": correlation.kernel_dilation,
    }


def correlate_on_cpu(x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
    """Take all lanes in kernels.cc, or one after another by XLA."""
    if form == "native" and x.dtype == jnp.float32:
        shape = correlate_shape(x, kernel, correlation=correlation, form=form)
        output = jax.ShapeDtypeStruct(shape, x.dtype)
        return kernels.call("cnnlib_correlate", output, x, kernel, attributes=_attributes(correlation))

    def one(x: Array, kernel: Array) -> Array:
        if x.shape[-1] < FEW_CHANNELS and correlation.x_dilation == (1, 1):
            return im2col(x, kernel.shape[:2], correlation) @ kernel.reshape(-1, kernel.shape[-1])
        return stock(x, kernel, correlation)

    return one_after_another(one, x, kernel)


def input_gradient_on_cpu(gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str) -> Array:
    """Scatter the gradient where that is faster; else correlate it with the kernel turned."""
    if form == "native" and gradient.dtype == jnp.float32 and scatters(gradient, kernel, size, correlation):
        shape = input_gradient_shape(gradient, kernel, size=size, correlation=correlation, form=form)
        output = jax.ShapeDtypeStruct(shape, gradient.dtype)
        return kernels.call("cnnlib_scatter", output, gradient, kernel, attributes=_attributes(correlation))
    back, turned = turned_for(kernel, size, correlation)
    return correlate_on_cpu(gradient, turned, correlation=back, form=form)


VECTOR = 8
"""Values per vector register in the costs of `scatters`; more would favour scattering more."""


def scatters(gradient: Any, kernel: Any, size: Pair, correlation: Correlation) -> bool:
    """Choose how kernels.cc takes a gradient back to the input: whether it scatters.

    A correlation computes each value of the input by itself, in vectors of channels, and multiplies padding too. To
    scatter computes what each position of the output adds to its window, in vectors that hold a row of the window, and
    adds it there. So few channels and little padding in the forward direction favour it. Costs are products of
    vectors; a single vector per row is a third slower than more, and to add takes as long as two products.
    """
    if correlation.x_dilation != (1, 1):
        return False
    _, _, rows, columns, features = gradient.shape
    *_, height, width, channels, _ = kernel.shape
    vectors = -(-channels // VECTOR)
    positions = size[0] * size[1] / math.prod(correlation.strides)
    correlated = positions * height * width * features * (4 / 3 if vectors == 1 else vectors)
    joined = width if correlation.kernel_dilation[1] == 1 else 1
    vectors = -(-joined * channels // VECTOR)
    scattered = rows * columns * height * (width // joined) * (features + 2) * vectors
    return bool(scattered < correlated)


def turned_for(kernel: Array, size: Pair, correlation: Correlation) -> tuple[Correlation, Array]:
    """Return the correlation that takes gradients back to inputs of `size`, and the kernel that it takes.

    That is the kernel turned by 180 degrees, its channels and features exchanged. It may have lanes.
    """
    return correlation.transposed(size, kernel.shape[-4:-2]), jnp.flip(kernel, (-4, -3)).swapaxes(-1, -2)


def kernel_gradient_on_cpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
    """Take all lanes in kernels.cc, or one after another by XLA."""
    if form == "native" and x.dtype == jnp.float32:
        shape = kernel_gradient_shape(x, gradient, window=window, correlation=correlation, form=form)
        output = jax.ShapeDtypeStruct(shape, x.dtype)
        return kernels.call("cnnlib_kernel_gradient", output, x, gradient, attributes=_attributes(correlation))

    def one(x: Array, gradient: Array) -> Array:
        # The patches of a whole batch outgrow the cache, so up to 8 blocks of it, one after another. And a loop's
        # operands are stored, so what made x is not computed once per tap.
        blocks = max(n for n in range(1, 9) if x.shape[0] % n == 0)
        parts = (x.reshape(blocks, -1, *x.shape[1:]), gradient.reshape(blocks, -1, *gradient.shape[1:]))
        products: Array = lax.map(lambda part: contract(im2col(part[0], window, correlation), part[1]), parts)
        return products.sum(axis=0).astype(x.dtype).reshape(*window, x.shape[-1], gradient.shape[-1])

    return one_after_another(one, x, gradient)


def correlate_on_gpu(x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
    """Make lanes the groups of one convolution."""
    return together(functools.partial(convolution, correlation=correlation), x, kernel)


def input_gradient_on_gpu(gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str) -> Array:
    """Make lanes the groups of one convolution, which turns their kernels itself."""
    one = functools.partial(convolution_input_gradient, size=size, correlation=correlation)
    return together(one, gradient, kernel)


def kernel_gradient_on_gpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
    """Make lanes the groups of one convolution."""
    one = functools.partial(convolution_kernel_gradient, window=window, correlation=correlation)
    return together(one, x, gradient)


def correlate_on_tpu(x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
    """Make lanes the groups of one convolution; compute a lane alone in blocks."""
    if x.shape[0] > 1:
        return correlate_on_gpu(x, kernel, correlation=correlation, form=form)
    return in_blocks(x[0], kernel[0], correlation)[None]


def input_gradient_on_tpu(gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str) -> Array:
    """Make lanes the groups of one convolution; compute a lane alone in blocks."""
    if gradient.shape[0] > 1:
        return input_gradient_on_gpu(gradient, kernel, size=size, correlation=correlation, form=form)
    back, turned = turned_for(kernel[0], size, correlation)
    return in_blocks(gradient[0], turned, back)[None]


def kernel_gradient_on_tpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
    """Make lanes the groups of one convolution; compute a lane alone in blocks."""
    if x.shape[0] > 1:
        return kernel_gradient_on_gpu(x, gradient, window=window, correlation=correlation, form=form)
    return kernel_gradient_in_blocks(x[0], gradient[0], window, correlation)[None]


# Correlation and max pooling in one. Of the map between them only the winners are kept: an integer per window, with one
# bit per tap that equals the largest. In kernels.cc the map never leaves the cache, forward or backward. Accelerators
# run the two apart. Elsewhere serves programs that were traced for a CPU and are lowered for another platform.

MOST_TAPS = 31
"""Bits of an integer that are not its sign."""


def pools_within(form: str, dtype: Any, pooling: Pooling) -> bool:
    """Whether a correlation and the pooling behind it run as one: where each window lies within the map."""
    padded = any(map(any, pooling.padding))
    return form == "native" and dtype == jnp.float32 and not padded and math.prod(pooling.window) <= MOST_TAPS


def pooled_correlate_shape(x: Any, kernel: Any, *_: Any, correlation: Correlation, pooling: Pooling, form: str) -> Any:
    """Return `(lane, image, row, column, feature)` of the pooled map."""
    lanes, images, *size, features = correlate_shape(x, kernel, correlation=correlation, form=form)
    return (lanes, images, *pooling.output_size(tuple(size)), features)


def pooled_input_gradient_shape(gradient: Any, kernel: Any, *_: Any, pooling: Pooling, **static: Any) -> Any:
    """Return `(lane, image, height, width, channel)`."""
    return input_gradient_shape(gradient, kernel, **static)


def pooled_kernel_gradient_shape(x: Any, gradient: Any, *_: Any, pooling: Pooling, **static: Any) -> Any:
    """Return `(lane, kernel_height, kernel_width, channel, feature)`."""
    return kernel_gradient_shape(x, gradient, **static)


def _pooled_attributes(correlation: Correlation, pooling: Pooling, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    own = _pooling_attributes(pooling)
    renamed = {"window": own["window"], "pool_strides": own["strides"], "pool_low": own["low"]}
    return {**_attributes(correlation), "size": size, **renamed}


def correlate_max_on_cpu(
    x: Array, kernel: Array, *, correlation: Correlation, pooling: Pooling, form: str
) -> tuple[Array, Array]:
    """Return the largest values and their winners, both from kernels.cc."""
    shape = pooled_correlate_shape(x, kernel, correlation=correlation, pooling=pooling, form=form)
    size = correlation.output_size(x.shape[2:4], kernel.shape[1:3])
    largest, winners = jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(shape, jnp.int32)
    attributes = _pooled_attributes(correlation, pooling, size)
    return kernels.call("cnnlib_correlate_pooled", (largest, winners), x, kernel, attributes=attributes)


def correlate_max_elsewhere(
    x: Array, kernel: Array, *, correlation: Correlation, pooling: Pooling, form: str
) -> tuple[Array, Array]:
    """Return the largest values and their winners."""
    y = correlate_on_gpu(x, kernel, correlation=correlation, form=form)
    maps = y.reshape(-1, *y.shape[2:])
    largest = max_pool(maps, pooling=pooling, form=form)
    bits = [won.astype(jnp.int32) << tap for tap, won in enumerate(_winners(maps, largest, pooling))]
    lanes = lambda array: array.reshape(*y.shape[:2], *array.shape[1:])  # noqa: E731
    return lanes(largest), lanes(functools.reduce(operator.or_, bits))


def correlate_at_winners(
    x: Array,
    kernel: Array,
    winners: Array,
    *,
    correlation: Correlation,
    pooling: Pooling,
    form: str,
    on: Callable[..., Array],
) -> Array:
    """Return each window's mean over its winners of the correlation: the forward derivative of the largest values.

    `on` is the platform's own correlation.
    """
    y = on(x, kernel, correlation=correlation, form=form)
    wins = _bits(winners.reshape(-1, *winners.shape[2:]), pooling)
    taps = zip(wins, _under(y.reshape(-1, *y.shape[2:]), pooling, fill=0.0), strict=True)
    total = functools.reduce(operator.add, [jnp.where(won, tap, jnp.zeros((), y.dtype)) for won, tap in taps])
    return _share(total, wins).reshape(winners.shape)


def pooled_input_gradient_on_cpu(
    gradient: Array, kernel: Array, winners: Array, *, size: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Take the gradient of the largest values back to the input in kernels.cc, as `input_gradient_on_cpu` does."""
    between = correlation.output_size(size, kernel.shape[1:3])
    output = jax.ShapeDtypeStruct(
        input_gradient_shape(gradient, kernel, size=size, correlation=correlation, form=form), gradient.dtype
    )
    maps = jax.ShapeDtypeStruct((*gradient.shape[:2], *between, gradient.shape[-1]), gradient.dtype)
    target, own = "cnnlib_scatter_unpooled", correlation
    if not scatters(maps, kernel, size, correlation):
        target, (own, kernel) = "cnnlib_correlate_unpooled", turned_for(kernel, size, correlation)
    return kernels.call(target, output, gradient, kernel, winners, attributes=_pooled_attributes(own, pooling, between))


def pooled_input_gradient_elsewhere(
    gradient: Array, kernel: Array, winners: Array, *, size: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Take the gradient of the largest values back to the input."""
    maps = _unpool(gradient, winners, pooling, correlation.output_size(size, kernel.shape[1:3]))
    return input_gradient_on_gpu(maps, kernel, size=size, correlation=correlation, form=form)


def pooled_kernel_gradient_on_cpu(
    x: Array, gradient: Array, winners: Array, *, window: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Take the gradient of the largest values back to the kernel in kernels.cc."""
    shape = kernel_gradient_shape(x, gradient, window=window, correlation=correlation, form=form)
    attributes = _pooled_attributes(correlation, pooling, correlation.output_size(x.shape[2:4], window))
    output = jax.ShapeDtypeStruct(shape, x.dtype)
    return kernels.call("cnnlib_kernel_gradient_unpooled", output, x, gradient, winners, attributes=attributes)


def pooled_kernel_gradient_elsewhere(
    x: Array, gradient: Array, winners: Array, *, window: Pair, pooling: Pooling, correlation: Correlation, form: str
) -> Array:
    """Take the gradient of the largest values back to the kernel."""
    maps = _unpool(gradient, winners, pooling, correlation.output_size(x.shape[2:4], window))
    return kernel_gradient_on_gpu(x, maps, window=window, correlation=correlation, form=form)


def _bits(winners: Array, pooling: Pooling) -> list[Array]:
    """Say tap by tap which values won."""
    return [winners >> tap & 1 == 1 for tap in range(math.prod(pooling.window))]


def _share(array: Array, wins: list[Array]) -> Array:
    """Divide by the number of winners, by 1 where there is none."""
    count = functools.reduce(operator.add, [won.astype(array.dtype) for won in wins])
    return array / jnp.maximum(count, jnp.ones((), array.dtype))


def _unpool(gradient: Array, winners: Array, pooling: Pooling, size: tuple[int, ...]) -> Array:
    """Give each winner its share of its window's gradient, on maps of `size`; all with lanes."""
    flat, kept = (array.reshape(-1, *array.shape[2:]) for array in (gradient, winners))
    wins = _bits(kept, pooling)
    share, zero = _share(flat, wins), jnp.zeros((), gradient.dtype)
    like = jax.ShapeDtypeStruct((flat.shape[0], *size, flat.shape[-1]), gradient.dtype)
    each = [jnp.where(won, share, zero) for won in wins]
    (maps,) = jax.linear_transpose(lambda maps: _under(maps, pooling, fill=0.0), like)(each)
    return jnp.asarray(maps).reshape(*gradient.shape[:2], *size, gradient.shape[-1])


# Blocks, for TPUs.

COLUMNS = 128
"""Columns of a TPU's matrix unit."""
ROWS = 8
"""Rows of a tile of a TPU's vector memory. Features are filled up to whole tiles."""
NARROW = 16
"""Most features for which `in_blocks` needs fewer cycles than a plain convolution, as libtpu 0.0.42.1 compiles both for
v5e. More features are written out of their blocks for longer than they gain."""
NARROW_GRADIENT = 64
"""The same for `kernel_gradient_in_blocks`."""
FEW_TAPS = 16
"""Windows below this many taps grow too much: blocks of 4x4 have four times the multiply-adds of 3x3 taps. Gradients of
more than `NARROW` features take smaller blocks, and still gain (docs/accelerators.md)."""


class Blocks(NamedTuple):
    """A correlation that computes a block of neighbouring outputs at each position.

    A TPU's matrix unit has 128 columns, and a convolution of 6 features leaves 122 of them idle. A block's outputs are
    computed as more features of one position: the window grows by the block, the strides are multiplied by it, and the
    larger kernel holds the small one once per output of the block, zeros around it. Those zeros are multiplied too:
    2.6 times the multiply-adds for 5x5 taps in blocks of 4x4, on 16 times as many columns.
    """

    size: Pair
    """Outputs per block."""
    counts: Pair
    """Blocks per axis."""
    window: Pair
    """Of the larger kernel."""
    correlation: Correlation
    """Of the larger kernel."""


def blocks_of(
    size: tuple[int, ...], window: tuple[int, ...], features: int, most: int, correlation: Correlation
) -> Blocks | None:
    """Choose the largest blocks, of up to 4 outputs per axis, that fit the columns and divide the outputs.

    Return None where a plain convolution is better: with more than `most` features, and for signals.
    """
    outputs = correlation.output_size(size, window)
    wide = features + -features % ROWS
    if wide > most or outputs[0] == 1:
        return None
    chosen = None
    for block in ((1, 2), (2, 2), (2, 4), (4, 4)):
        if math.prod(block) * wide <= COLUMNS and not any(n % b for n, b in zip(outputs, block, strict=True)):
            chosen = block
    if chosen is None:
        return None
    grown, padding = [], []
    for n, k, b, o, s, (low, _), spread, d in zip(size, window, chosen, outputs, *correlation, strict=True):
        grown.append((b - 1) * s + (k - 1) * d + 1)
        high = (o // b - 1) * b * s + grown[-1] - low - ((n - 1) * spread + 1)
        padding.append((low, high))
    strides = (chosen[0] * correlation.strides[0], chosen[1] * correlation.strides[1])
    larger = Correlation(strides, (padding[0], padding[1]), correlation.x_dilation, (1, 1))
    counts = (outputs[0] // chosen[0], outputs[1] // chosen[1])
    return Blocks(chosen, counts, (grown[0], grown[1]), larger)


def in_blocks(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute one lane by XLA's own convolution, in blocks of outputs where that is faster on a TPU."""
    window, features = kernel.shape[:2], kernel.shape[-1]
    blocks = blocks_of(x.shape[1:3], window, features, NARROW, correlation)
    if blocks is None or math.prod(window) < FEW_TAPS:
        return convolution(x, kernel, correlation)
    (rows, columns), (height, width) = blocks.counts, blocks.size
    y = stock(x, repeated(filled(kernel), correlation, blocks), blocks.correlation)
    y = y.reshape(x.shape[0], rows, columns, height, width, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(x.shape[0], rows * height, columns * width, -1)[..., : kernel.shape[-1]]


def kernel_gradient_in_blocks(x: Array, gradient: Array, window: Pair, correlation: Correlation) -> Array:
    """Compute the gradient of one lane's kernel, in blocks of outputs where that is faster on a TPU."""
    features = gradient.shape[-1]
    blocks = blocks_of(x.shape[1:3], window, features, NARROW_GRADIENT, correlation)
    if blocks is None or (math.prod(window) < FEW_TAPS and features <= NARROW):
        return convolution_kernel_gradient(x, gradient, window, correlation)
    (rows, columns), (height, width) = blocks.counts, blocks.size
    wide = filled(gradient).reshape(x.shape[0], rows, height, columns, width, -1).transpose(0, 1, 3, 2, 4, 5)
    wide = wide.reshape(x.shape[0], rows, columns, -1)
    larger = convolution_kernel_gradient(x, wide, blocks.window, blocks.correlation)
    like = jax.ShapeDtypeStruct((*window, x.shape[-1], features), x.dtype)
    (result,) = jax.linear_transpose(lambda kernel: repeated(filled(kernel), correlation, blocks), like)(larger)
    return jnp.asarray(result)


def filled(array: Array) -> Array:
    """Fill up the last axis, the features, with zeros to a multiple of `ROWS`."""
    return lax.pad(
        array, jnp.zeros((), array.dtype), [(0, 0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % ROWS, 0)]
    )


def repeated(kernel: Array, correlation: Correlation, blocks: Blocks) -> Array:
    """Make the larger kernel of `blocks`: `(*blocks.window, channel, output * feature)`."""
    (height, width), (step_h, step_w), (d_h, d_w) = blocks.size, correlation.strides, correlation.kernel_dilation
    zero = jnp.zeros((), kernel.dtype)
    copies = []
    for i in range(height):
        for j in range(width):
            rows = (i * step_h, (height - 1 - i) * step_h, d_h - 1)
            columns = (j * step_w, (width - 1 - j) * step_w, d_w - 1)
            copies.append(lax.pad(kernel, zero, [rows, columns, (0, 0, 0), (0, 0, 0)]))
    return jnp.stack(copies, axis=-2).reshape(*blocks.window, kernel.shape[-2], -1)


# Local layers: a kernel per position, `(lane, row, column, kernel_height, kernel_width, channel, feature)`.

Over = Callable[..., Array]
"""How lanes run: `together` or `one_after_another`."""


def local_lane(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute one lane as one matrix product, batched over positions. Weights are not copied."""
    rows, columns, height, width, channels, features = kernel.shape
    # Positions first, since they are what the product is batched over; images and channels travel as one.
    images_last = x.transpose(1, 2, 0, 3).reshape(1, *x.shape[1:3], -1)
    taps = taps_of(images_last, (height, width), correlation, fill=0.0)
    patches = jnp.concatenate([tap.reshape(rows * columns, -1, channels) for tap in taps], axis=-1)
    y = lax.batch_matmul(patches, kernel.reshape(rows * columns, -1, features))
    return y.reshape(rows, columns, -1, features).transpose(2, 0, 1, 3)


def local_lane_on_tpu(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """Compute one lane as the same product, of windows that a convolution with the identity gathers.

    A TPU's matrix unit puts values side by side about six times as fast as its vector unit. It rounds them as the
    product behind it would.
    """
    rows, columns, height, width, channels, features = kernel.shape
    taps = height * width * channels
    identity = jnp.eye(taps, dtype=x.dtype).reshape(height, width, channels, taps)
    patches = stock(x, identity, correlation).reshape(x.shape[0], rows * columns, taps)
    weights = kernel.reshape(rows * columns, taps, features)
    # Positions, features, images: a TPU's convolutions have images last as well.
    y = lax.dot_general(weights, patches, (((1,), (2,)), ((0,), (1,))))
    return y.reshape(rows, columns, features, -1).transpose(3, 0, 1, 2)


class Local(NamedTuple):
    """The lowerings of a local layer's family: the layer, and its gradients for the input and for the kernel."""

    lane: Callable[..., Array]
    """Compute one lane forward; linear in input and kernel."""
    over: Over = together

    def forward(self, x: Array, kernel: Array, *, correlation: Correlation, form: str) -> Array:
        """Compute the layer's output."""
        return self.over(functools.partial(self.lane, correlation=correlation), x, kernel)

    def input_gradient(
        self, gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, form: str
    ) -> Array:
        """Compute the gradient for an input of `size`, from that of the output."""
        _, *shape = local_input_shape(gradient, kernel, size=size, correlation=correlation, form=form)
        like = jax.ShapeDtypeStruct(tuple(shape), gradient.dtype)

        def one(gradient: Array, kernel: Array) -> Array:
            (result,) = jax.linear_transpose(lambda x: self.lane(x, kernel, correlation), like)(gradient)
            return jnp.asarray(result)

        return self.over(one, gradient, kernel)

    def kernel_gradient(self, x: Array, gradient: Array, *, window: Pair, correlation: Correlation, form: str) -> Array:
        """Compute the gradient for kernels of `window`, from that of the output."""
        _, *shape = local_kernel_shape(x, gradient, window=window, correlation=correlation, form=form)
        like = jax.ShapeDtypeStruct(tuple(shape), x.dtype)

        def one(x: Array, gradient: Array) -> Array:
            (result,) = jax.linear_transpose(lambda kernel: self.lane(x, kernel, correlation), like)(gradient)
            return jnp.asarray(result)

        return self.over(one, x, gradient)


LOCAL_ON_XLA_CPU = Local(local_lane, one_after_another)
LOCAL_ON_GPU = Local(local_lane)
LOCAL_ON_TPU = Local(local_lane_on_tpu)


def local_on_cpu(
    target: str, shape: Callable[..., tuple[int, ...]], otherwise: Callable[..., Array]
) -> Callable[..., Array]:
    """Make the lowering that calls `target` of kernels.cc where that serves, and `otherwise` elsewhere.

    The kernel turns its first operand in a scratch of rows of whole vectors.
    """

    def lowered(first: Array, second: Array, *, correlation: Correlation, form: str, **static: Any) -> Array:
        if form != "native" or first.dtype != jnp.float32 or first.shape[1] < FEW_IMAGES:
            return otherwise(first, second, correlation=correlation, form=form, **static)
        output = jax.ShapeDtypeStruct(shape(first, second, correlation=correlation, form=form, **static), first.dtype)
        turned = jax.ShapeDtypeStruct((math.prod(first.shape[2:]), -(-first.shape[1] // 16) * 16), first.dtype)
        attributes = {
            "strides": correlation.strides,
            "low": tuple(low for low, _ in correlation.padding),
            "dilation": correlation.kernel_dilation,
        }
        return kernels.call(target, output, first, second, scratch=turned, attributes=attributes)

    return lowered


# Max pooling: `x` is `(image, height, width, channel)`, lanes among the images.


def _under(x: Array, pooling: Pooling, fill: float) -> list[Array]:
    correlation = Correlation(pooling.strides, pooling.padding, (1, 1), (1, 1))
    return taps_of(x, pooling.window, correlation, fill)


def _pooling_attributes(pooling: Pooling) -> dict[str, tuple[int, ...]]:
    low = tuple(low for low, _ in pooling.padding)
    return {"window": pooling.window, "strides": pooling.strides, "low": low}


def max_pool(x: Array, *, pooling: Pooling, form: str) -> Array:
    """Take the maximum over the taps of the window."""
    return functools.reduce(jnp.maximum, _under(x, pooling, fill=-jnp.inf))


def max_pool_on_cpu(x: Array, *, pooling: Pooling, form: str) -> Array:
    """Pool in kernels.cc where that serves."""
    if form != "native" or x.dtype != jnp.float32:
        return max_pool(x, pooling=pooling, form=form)
    output = jax.ShapeDtypeStruct(pooled_shape(x, pooling=pooling, form=form), x.dtype)
    return kernels.call("cnnlib_max_pool", output, x, attributes=_pooling_attributes(pooling))


MOST_CHOICES = 9
"""Taps of a window up to which `winner_shares` chooses between reciprocals."""


def keeps_shares(form: str) -> bool:
    """Whether max pooling finds the winners' shares with the winners, and keeps them for the gradient.

    On a TPU that saves the gradient a pass over the input, and a division. Elsewhere the gradient finds them again.
    """
    return form == "tpu"


def _winners(x: Array, y: Array, pooling: Pooling) -> list[Array]:
    """Say tap by tap which values equal their window's largest.

    Padding never wins, not even where all values are minus infinity.
    """
    return [tap == y for tap in _under(x, pooling, fill=jnp.nan)]


def winner_counts(x: Array, y: Array, pooling: Pooling) -> Array:
    """Count the winners of each window: at least 1, also where there is none because the largest is not a number."""
    count = functools.reduce(operator.add, [won.astype(x.dtype) for won in _winners(x, y, pooling)])
    return jnp.maximum(count, jnp.ones((), x.dtype))


def winner_shares(x: Array, y: Array, pooling: Pooling) -> Array:
    """Return the share of its window's gradient that each winner gets: one by the count, without a division.

    On a TPU a choice between the reciprocals of small counts is faster than a division.
    """
    counts, size = winner_counts(x, y, pooling), math.prod(pooling.window)
    if size > MOST_CHOICES:
        return 1 / counts
    shares = jnp.full_like(counts, 1 / size)
    for count in range(size - 1, 0, -1):
        shares = jnp.where(counts == count, jnp.asarray(1 / count, x.dtype), shares)
    return shares


def select(x: Array, y: Array, shares: Array, direction: Array, *, pooling: Pooling, form: str) -> Array:
    """Follow a direction through the winners: the forward derivative of `max_pool`.

    `shares` are those of `winner_shares` where `keeps_shares`; elsewhere they are not looked at.
    """
    zero = jnp.zeros((), x.dtype)
    taps = zip(_winners(x, y, pooling), _under(direction, pooling, fill=0.0), strict=True)
    total = functools.reduce(operator.add, [jnp.where(won, tap, zero) for won, tap in taps])
    return total * shares if keeps_shares(form) else total / winner_counts(x, y, pooling)


def spread(x: Array, y: Array, shares: Array, gradient: Array, *, pooling: Pooling, form: str) -> Array:
    """Give each winner its share of the window's gradient: the transpose of `select`."""
    share = gradient * shares if keeps_shares(form) else gradient / winner_counts(x, y, pooling)
    zero = jnp.zeros((), x.dtype)
    if pooling.strides == pooling.window and not any(map(any, pooling.padding)):
        return _spread_over_tiles(x, y, share, pooling.window)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    each = [jnp.where(won, share, zero) for won in _winners(x, y, pooling)]
    (result,) = jax.linear_transpose(lambda x: _under(x, pooling, fill=0.0), like)(each)
    return jnp.asarray(result)


def _spread_over_tiles(x: Array, y: Array, share: Array, window: Pair) -> Array:
    """The same where windows do not overlap: one pass over the input, in place of one per tap."""
    size, (rows, columns), (height, width) = x.shape[1:3], y.shape[1:3], window
    tiles = x[:, : rows * height, : columns * width].reshape(x.shape[0], rows, height, columns, width, -1)
    won = tiles == jnp.expand_dims(y, (2, 4))
    shares = jnp.where(won, jnp.expand_dims(share, (2, 4)), jnp.zeros((), x.dtype))
    inside = shares.reshape(x.shape[0], rows * height, columns * width, -1)
    outside = [(0, 0, 0), (0, size[0] - rows * height, 0), (0, size[1] - columns * width, 0), (0, 0, 0)]
    return lax.pad(inside, jnp.zeros((), x.dtype), outside)


def spread_on_cpu(x: Array, y: Array, shares: Array, gradient: Array, *, pooling: Pooling, form: str) -> Array:
    """Do the same in kernels.cc where that serves."""
    if form != "native" or x.dtype != jnp.float32:
        return spread(x, y, shares, gradient, pooling=pooling, form=form)
    output = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernels.call("cnnlib_max_pool_gradient", output, x, y, gradient, attributes=_pooling_attributes(pooling))
