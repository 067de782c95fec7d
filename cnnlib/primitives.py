"""What the operations are made of: JAX primitives with derivative, batching and lowering rules of their own.

A correlation is linear in its input and in its kernel, and so is each of its derivatives; they form a closed family of
two, `correlate` and `kernel_gradient`, from which JAX takes derivatives of any order, forward and reverse; a local
layer has a family of three, `local`, `local_input` and `local_kernel`. Max pooling is linear in a direction once its
winners are known: `select` follows them, `spread` is its transpose.

Each carries lanes: `x` is `(lane, image, height, width, channel)`, a kernel `(lane, height, width, channel, feature)`.
`jax.vmap` adds to the lanes (or to the images, where lanes share a kernel), and the lowering decides how lanes run:
on a CPU kernels.cc takes them all, or XLA one after another; on an accelerator they are one batched product.
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
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from cnnlib import kernels

Pair = tuple[int, int]

FEW_CHANNELS = 4
"""Below this many input channels, so for grey and colour images, XLA's CPU convolutions lose to im2col."""


class Correlation(NamedTuple):
    """The static side of a correlation, `(height, width)` each."""

    strides: Pair
    padding: tuple[Pair, Pair]
    """Before and after; may be negative, which crops."""
    x_dilation: Pair
    """Steps between the values of the input, zeros in between."""
    kernel_dilation: Pair

    def output_size(self, size: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
        """Positions an axis."""
        return tuple(
            ((n - 1) * spread + 1 + low + high - ((k - 1) * d + 1)) // s + 1
            for n, k, s, (low, high), spread, d in zip(size, window, *self, strict=True)
        )

    def transposed(self, size: tuple[int, ...], window: tuple[int, ...]) -> Correlation:
        """The correlation that takes a gradient of the output, with the kernel turned, back to an input of `size`."""
        padding = []
        for n, outputs, k, s, (low, _), spread, d in zip(
            size, self.output_size(size, window), window, *self, strict=True
        ):
            before = (k - 1) * d - low
            # So that the last of n results, `spread` apart, needs all of it and no more.
            after = (n - 1) * spread + 1 + (k - 1) * d - ((outputs - 1) * s + 1) - before
            padding.append((before, after))
        return Correlation(self.x_dilation, (padding[0], padding[1]), self.strides, self.kernel_dilation)


class Pooling(NamedTuple):
    """The static side of a pooling, `(height, width)` each."""

    window: Pair
    strides: Pair
    padding: tuple[Pair, Pair]

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Positions an axis."""
        return tuple((n + low + high - k) // s + 1 for n, k, s, (low, high) in zip(size, *self, strict=True))


def correlate(
    x: Float[Array, "lane image height width channel"],
    kernel: Float[Array, "lane kernel_height kernel_width channel feature"],
    correlation: Correlation,
) -> Float[Array, "lane image output_height output_width feature"]:
    """Each lane's images, correlated with its kernel."""
    result: Array = correlate_p.bind(x, kernel, correlation=correlation, cpu=cpu_kernels())
    return result


def max_pool(
    x: Float[Array, "image height width channel"], pooling: Pooling
) -> Float[Array, "image rows columns channel"]:
    """The largest value under each window."""
    result: Array = max_pool_p.bind(x, pooling=pooling, cpu=cpu_kernels())
    return result


def cpu_kernels() -> str:
    """What the CPU is to run; where JAX's default is an accelerator, nothing is compiled for the CPU beside it."""
    return kernels.chosen() if jax.default_backend() == "cpu" else "xla"


def define(
    name: str, shape: Callable[..., tuple[int, ...]], cpu: Callable[..., Array], elsewhere: Callable[..., Array]
) -> Primitive:
    """A primitive whose result has the type of its operands, lowered as written in `cpu` or `elsewhere`.

    A sum over nothing is zero: operands or results without elements reach neither.
    """
    primitive = Primitive(f"cnnlib_{name}")

    def abstract(*avals: Any, **static: Any) -> ShapedArray:
        if len({aval.dtype for aval in avals}) > 1:
            raise TypeError(f"{primitive} takes operands of one type, not {', '.join(str(a.dtype) for a in avals)}")
        return ShapedArray(shape(*avals, **static), avals[0].dtype)

    def lowered(body: Callable[..., Array]) -> Any:
        def of(*operands: Array, **static: Any) -> Array:
            size = shape(*operands, **static)
            if 0 in size or any(0 in operand.shape for operand in operands):
                return jnp.zeros(size, operands[0].dtype)
            return body(*operands, **static)

        return mlir.lower_fun(of, multiple_results=False)

    primitive.def_abstract_eval(abstract)
    # Outside jit an operation is a program of its own.
    compiled = functools.cache(lambda static: jax.jit(lambda *operands: primitive.bind(*operands, **dict(static))))
    primitive.def_impl(lambda *operands, **static: compiled(tuple(static.items()))(*operands))
    mlir.register_lowering(primitive, lowered(cpu), platform="cpu")
    mlir.register_lowering(primitive, lowered(elsewhere))
    return primitive


# Correlations: shapes, lowering to kernels.cc or to XLA, derivatives, batching.


def _correlate_shape(x: Any, kernel: Any, *, correlation: Correlation, cpu: str) -> tuple[int, ...]:
    if x.shape[0] != kernel.shape[0] or x.shape[-1] != kernel.shape[-2]:
        raise TypeError(f"x {x.shape} and kernel {kernel.shape} differ in lanes or channels")
    return (*x.shape[:2], *correlation.output_size(x.shape[2:4], kernel.shape[1:3]), kernel.shape[-1])


def _kernel_gradient_shape(
    x: Any, gradient: Any, *, window: Pair, correlation: Correlation, cpu: str
) -> tuple[int, ...]:
    return (x.shape[0], *window, x.shape[-1], gradient.shape[-1])


def _attributes(correlation: Correlation) -> dict[str, tuple[int, ...]]:
    return {
        "strides": correlation.strides,
        "low": tuple(low for low, _ in correlation.padding),
        "x_dilation": correlation.x_dilation,
        "kernel_dilation": correlation.kernel_dilation,
    }


def _correlate_on_cpu(x: Array, kernel: Array, *, correlation: Correlation, cpu: str) -> Array:
    if cpu == "native" and x.dtype == jnp.float32:
        shape = _correlate_shape(x, kernel, correlation=correlation, cpu=cpu)
        output = jax.ShapeDtypeStruct(shape, x.dtype)
        return kernels.call("cnnlib_correlate", output, x, kernel, attributes=_attributes(correlation))

    def one(x: Array, kernel: Array) -> Array:
        if x.shape[-1] < FEW_CHANNELS and correlation.x_dilation == (1, 1):
            return im2col(x, kernel.shape[:2], correlation) @ kernel.reshape(-1, kernel.shape[-1])
        return stock(x, kernel, correlation)

    return one_after_another(one, x, kernel)


def _correlate_elsewhere(x: Array, kernel: Array, *, correlation: Correlation, cpu: str) -> Array:
    lanes = x.shape[0]
    if lanes == 1:
        return stock(x[0], kernel[0], correlation)[None]
    # Lanes as the groups of one convolution are slow, backward above all (jax issues 13800 and 26568).
    patches = jax.vmap(functools.partial(im2col, window=kernel.shape[1:3], correlation=correlation))(x)
    flat = patches.reshape(lanes, -1, patches.shape[-1])
    product = lax.batch_matmul(flat, kernel.reshape(lanes, -1, kernel.shape[-1]))
    return product.reshape(*patches.shape[:-1], kernel.shape[-1])


def _kernel_gradient_on_cpu(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, cpu: str) -> Array:
    if cpu == "native" and x.dtype == jnp.float32:
        shape = _kernel_gradient_shape(x, gradient, window=window, correlation=correlation, cpu=cpu)
        output = jax.ShapeDtypeStruct(shape, x.dtype)
        return kernels.call("cnnlib_kernel_gradient", output, x, gradient, attributes=_attributes(correlation))

    def one(x: Array, gradient: Array) -> Array:
        # The patches of a whole batch outgrow the cache, so up to 8 blocks of it, one after another. And a loop's
        # operands are stored, so what made x is not computed once a tap.
        blocks = max(n for n in range(1, 9) if x.shape[0] % n == 0)
        parts = (x.reshape(blocks, -1, *x.shape[1:]), gradient.reshape(blocks, -1, *gradient.shape[1:]))
        products: Array = lax.map(lambda part: contract(im2col(part[0], window, correlation), part[1]), parts)
        return products.sum(axis=0).astype(x.dtype).reshape(*window, x.shape[-1], gradient.shape[-1])

    return one_after_another(one, x, gradient)


def _kernel_gradient_elsewhere(x: Array, gradient: Array, *, window: Pair, correlation: Correlation, cpu: str) -> Array:
    def one(x: Array, gradient: Array) -> Array:
        if lanes == 1:  # the derivative that XLA's accelerator libraries have kernels for
            like = jax.ShapeDtypeStruct((*window, x.shape[-1], gradient.shape[-1]), x.dtype)
            (result,) = jax.linear_transpose(lambda kernel: stock(x, kernel, correlation), like)(gradient)
            return jnp.asarray(result)
        product = contract(im2col(x, window, correlation), gradient)
        return product.astype(x.dtype).reshape(*window, x.shape[-1], gradient.shape[-1])

    lanes = x.shape[0]
    return one(x[0], gradient[0])[None] if lanes == 1 else jax.vmap(one)(x, gradient)


def one_after_another(one: Callable[..., Array], *operands: Array) -> Array:
    """`one` lane's result for every lane: XLA's CPU runs a batched convolution slower than one at a time."""
    if operands[0].shape[0] == 1:
        return one(*(operand[0] for operand in operands))[None]
    result: Array = lax.map(lambda lane: one(*lane), operands)
    return result


def stock(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """One lane by XLA's own convolution."""
    return lax.conv_general_dilated(x, kernel, *correlation, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def contract(patches: Array, gradient: Array) -> Array:
    """Sums `patches[..., i] * gradient[..., j]` over images and positions, accumulating in float32 at least."""
    axes = tuple(range(gradient.ndim - 1))
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    return lax.dot_general(patches, gradient, ((axes, axes), ((), ())), preferred_element_type=wide)


def im2col(x: Array, window: tuple[int, ...], correlation: Correlation) -> Array:
    """The values under the window at each position, `(image, rows, columns, taps * channels)`, taps slowest."""
    taps = taps_of(x, window, correlation, fill=0.0)
    return jnp.concatenate(taps, axis=-1)


def taps_of(x: Array, window: tuple[int, ...], correlation: Correlation, fill: float) -> list[Array]:
    """For each tap of the window, row by row: the value under it everywhere, `(image, rows, columns, channel)`."""
    rows, columns = correlation.output_size(x.shape[1:3], window)
    (low_h, high_h), (low_w, high_w) = correlation.padding
    (spread_h, spread_w), (step_h, step_w) = correlation.x_dilation, correlation.strides
    edges = [(0, 0, 0), (low_h, high_h, spread_h - 1), (low_w, high_w, spread_w - 1), (0, 0, 0)]
    padded = lax.pad(x, jnp.asarray(fill, x.dtype), edges)
    taps = []
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * correlation.kernel_dilation[0], j * correlation.kernel_dilation[1]
            stops = (x.shape[0], top + (rows - 1) * step_h + 1, left + (columns - 1) * step_w + 1, x.shape[3])
            taps.append(lax.slice(padded, (0, top, left, 0), stops, (1, step_h, step_w, 1)))
    return taps


correlate_p = define("correlate", _correlate_shape, _correlate_on_cpu, _correlate_elsewhere)
kernel_gradient_p = define(
    "kernel_gradient", _kernel_gradient_shape, _kernel_gradient_on_cpu, _kernel_gradient_elsewhere
)


def _back_to_x(gradient: Array, kernel: Array, size: Pair, correlation: Correlation, cpu: str) -> Array:
    """The transpose in the input: the gradient meets the kernel turned, its channels and features exchanged."""
    turned = jnp.flip(kernel, (1, 2)).swapaxes(-1, -2)
    back = correlation.transposed(size, kernel.shape[1:3])
    result: Array = correlate_p.bind(gradient, turned, correlation=back, cpu=cpu)
    return result


ad.defbilinear(
    correlate_p,
    lambda gradient, x, kernel, *, correlation, cpu: _back_to_x(gradient, kernel, x.aval.shape[2:4], correlation, cpu),
    lambda gradient, x, kernel, *, correlation, cpu: kernel_gradient_p.bind(
        x, gradient, window=kernel.aval.shape[1:3], correlation=correlation, cpu=cpu
    ),
)
ad.defbilinear(
    kernel_gradient_p,
    lambda direction, x, gradient, *, window, correlation, cpu: _back_to_x(
        gradient, direction, x.aval.shape[2:4], correlation, cpu
    ),
    lambda direction, x, gradient, *, window, correlation, cpu: correlate_p.bind(
        x, direction, correlation=correlation, cpu=cpu
    ),
)

# Local layers: a correlation whose kernel is another one at each position, `(lane, row, column, kernel_height,
# kernel_width, channel, feature)`. It is linear in input and kernel; its two transposes close the family of three.

FEW_IMAGES = 8
"""Below this many the vectors of kernels.cc, which hold as many images, are mostly empty."""


def local(
    x: Float[Array, "lane image height width channel"],
    kernel: Float[Array, "lane row column kernel_height kernel_width channel feature"],
    correlation: Correlation,
) -> Float[Array, "lane image row column feature"]:
    """Each lane's images, correlated with the lane's kernel for each position; `x_dilation` must be 1."""
    result: Array = local_p.bind(x, kernel, correlation=correlation, cpu=cpu_kernels())
    return result


def _local_shape(x: Any, kernel: Any, *, correlation: Correlation, cpu: str) -> tuple[int, ...]:
    positions = correlation.output_size(x.shape[2:4], kernel.shape[3:5])
    if (x.shape[0], *positions, x.shape[-1]) != (*kernel.shape[:3], kernel.shape[-2]):
        raise TypeError(f"x {x.shape} and kernel {kernel.shape} differ in lanes, positions or channels")
    return (*x.shape[:2], *positions, kernel.shape[-1])


def _local_input_shape(
    gradient: Any, kernel: Any, *, size: Pair, correlation: Correlation, cpu: str
) -> tuple[int, ...]:
    return (*gradient.shape[:2], *size, kernel.shape[-2])


def _local_kernel_shape(x: Any, gradient: Any, *, window: Pair, correlation: Correlation, cpu: str) -> tuple[int, ...]:
    return (x.shape[0], *gradient.shape[2:4], *window, x.shape[-1], gradient.shape[-1])


def _local_lane(x: Array, kernel: Array, correlation: Correlation) -> Array:
    """One matrix product, batched over positions. No weight is copied, and no value but for the windows."""
    rows, columns, height, width, channels, features = kernel.shape
    # Positions first, since they are what the product is batched over; images and channels travel as one.
    images_last = x.transpose(1, 2, 0, 3).reshape(1, *x.shape[1:3], -1)
    taps = taps_of(images_last, (height, width), correlation, fill=0.0)
    patches = jnp.concatenate([tap.reshape(rows * columns, -1, channels) for tap in taps], axis=-1)
    y = lax.batch_matmul(patches, kernel.reshape(rows * columns, -1, features))
    return y.reshape(rows, columns, -1, features).transpose(2, 0, 1, 3)


def together(one: Callable[..., Array], *operands: Array) -> Array:
    """`one` lane's result for every lane, vectorised."""
    if operands[0].shape[0] == 1:
        return one(*(operand[0] for operand in operands))[None]
    return jax.vmap(one)(*operands)


def _local(
    x: Array, kernel: Array, *, correlation: Correlation, cpu: str, over: Callable[..., Array] = together
) -> Array:
    return over(functools.partial(_local_lane, correlation=correlation), x, kernel)


def _local_input(
    gradient: Array, kernel: Array, *, size: Pair, correlation: Correlation, cpu: str, over: Any = together
) -> Array:
    _, *shape = _local_input_shape(gradient, kernel, size=size, correlation=correlation, cpu=cpu)
    like = jax.ShapeDtypeStruct(tuple(shape), gradient.dtype)

    def one(gradient: Array, kernel: Array) -> Array:
        (result,) = jax.linear_transpose(lambda x: _local_lane(x, kernel, correlation), like)(gradient)
        return jnp.asarray(result)

    lanes: Array = over(one, gradient, kernel)
    return lanes


def _local_kernel(
    x: Array, gradient: Array, *, window: Pair, correlation: Correlation, cpu: str, over: Any = together
) -> Array:
    _, *shape = _local_kernel_shape(x, gradient, window=window, correlation=correlation, cpu=cpu)
    like = jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    def one(x: Array, gradient: Array) -> Array:
        (result,) = jax.linear_transpose(lambda kernel: _local_lane(x, kernel, correlation), like)(gradient)
        return jnp.asarray(result)

    lanes: Array = over(one, x, gradient)
    return lanes


def _on_cpu(
    target: str, shape: Callable[..., tuple[int, ...]], otherwise: Callable[..., Array]
) -> Callable[..., Array]:
    """The lowering that calls kernels.cc, whose first operand it turns in a scratch of rows of whole vectors."""

    def lowered(first: Array, second: Array, *, correlation: Correlation, cpu: str, **static: Any) -> Array:
        images = first.shape[1]
        if cpu != "native" or first.dtype != jnp.float32 or images < FEW_IMAGES:
            # XLA's CPU runs the lanes' products faster one after another.
            return otherwise(first, second, correlation=correlation, cpu=cpu, over=one_after_another, **static)
        output = jax.ShapeDtypeStruct(shape(first, second, correlation=correlation, cpu=cpu, **static), first.dtype)
        turned = jax.ShapeDtypeStruct((math.prod(first.shape[2:]), -(-images // 16) * 16), first.dtype)
        attributes = {
            "strides": correlation.strides,
            "low": tuple(low for low, _ in correlation.padding),
            "dilation": correlation.kernel_dilation,
        }
        return kernels.call(target, output, first, second, scratch=turned, attributes=attributes)

    return lowered


local_p = define("local", _local_shape, _on_cpu("cnnlib_local_correlate", _local_shape, _local), _local)
local_input_p = define(
    "local_input",
    _local_input_shape,
    _on_cpu("cnnlib_local_input_gradient", _local_input_shape, _local_input),
    _local_input,
)
local_kernel_p = define(
    "local_kernel",
    _local_kernel_shape,
    _on_cpu("cnnlib_local_kernel_gradient", _local_kernel_shape, _local_kernel),
    _local_kernel,
)
ad.defbilinear(
    local_p,
    lambda gradient, x, kernel, *, correlation, cpu: local_input_p.bind(
        gradient, kernel, size=x.aval.shape[2:4], correlation=correlation, cpu=cpu
    ),
    lambda gradient, x, kernel, *, correlation, cpu: local_kernel_p.bind(
        x, gradient, window=kernel.aval.shape[3:5], correlation=correlation, cpu=cpu
    ),
)
ad.defbilinear(
    local_input_p,
    lambda direction, gradient, kernel, *, size, correlation, cpu: local_p.bind(
        direction, kernel, correlation=correlation, cpu=cpu
    ),
    lambda direction, gradient, kernel, *, size, correlation, cpu: local_kernel_p.bind(
        direction, gradient, window=kernel.aval.shape[3:5], correlation=correlation, cpu=cpu
    ),
)
ad.defbilinear(
    local_kernel_p,
    lambda direction, x, gradient, *, window, correlation, cpu: local_input_p.bind(
        gradient, direction, size=x.aval.shape[2:4], correlation=correlation, cpu=cpu
    ),
    lambda direction, x, gradient, *, window, correlation, cpu: local_p.bind(
        x, direction, correlation=correlation, cpu=cpu
    ),
)


def _merged(operand: Array, axis: int | None, size: int, into: int) -> Array:
    """`operand` with the mapped axis (or copies) merged into its axis `into`, as the slower of the two."""
    moved = jnp.broadcast_to(operand[None], (size, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
    moved = jnp.moveaxis(moved, 0, into)
    return moved.reshape(*moved.shape[:into], size * moved.shape[into + 1], *moved.shape[into + 2 :])


def _batch_lanes(primitive: Primitive, operands: Any, axes: Any, **static: Any) -> tuple[Array, int]:
    """The mapped axis becomes lanes, or images where only the input of a correlation has it."""
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    into = 1 if primitive in (correlate_p, local_p, local_input_p) and axes[1] is None else 0
    if into == 1:
        merged = [_merged(operands[0], axes[0], size, into=1), operands[1]]
    else:
        merged = [_merged(operand, axis, size, into=0) for operand, axis in zip(operands, axes, strict=True)]
    result = primitive.bind(*merged, **static)
    inner = merged[0].shape[into] // size if size else 0
    return result.reshape(*result.shape[:into], size, inner, *result.shape[into + 1 :]), into


for _primitive in (correlate_p, kernel_gradient_p, local_p, local_input_p, local_kernel_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch_lanes, _primitive)


# Max pooling: its largest values, the direction that follows the winners, and the gradient that goes back to them.


def _pooled_shape(x: Any, *_: Any, pooling: Pooling, cpu: str) -> tuple[int, ...]:
    return (x.shape[0], *pooling.output_size(x.shape[1:3]), x.shape[3])


def _under(x: Array, pooling: Pooling, fill: float) -> list[Array]:
    correlation = Correlation(pooling.strides, pooling.padding, (1, 1), (1, 1))
    return taps_of(x, pooling.window, correlation, fill)


def _pooling_attributes(pooling: Pooling) -> dict[str, tuple[int, ...]]:
    low = tuple(low for low, _ in pooling.padding)
    return {"window": pooling.window, "strides": pooling.strides, "low": low}


def _max_pool(x: Array, *, pooling: Pooling, cpu: str) -> Array:
    return functools.reduce(jnp.maximum, _under(x, pooling, fill=-jnp.inf))


def _max_pool_on_cpu(x: Array, *, pooling: Pooling, cpu: str) -> Array:
    if cpu == "xla" or x.dtype != jnp.float32:
        return _max_pool(x, pooling=pooling, cpu=cpu)
    output = jax.ShapeDtypeStruct(_pooled_shape(x, pooling=pooling, cpu=cpu), x.dtype)
    return kernels.call("cnnlib_max_pool", output, x, attributes=_pooling_attributes(pooling))


def _winners(x: Array, y: Array, pooling: Pooling) -> tuple[list[Array], Array]:
    """Which values equal their window's largest, tap by tap, and how many do; at least 1, for a window that has none
    because its largest is not a number. Padding equals nothing, not even where all values are minus infinity."""
    won = [tap == y for tap in _under(x, pooling, fill=jnp.nan)]
    count = functools.reduce(operator.add, [each.astype(x.dtype) for each in won])
    return won, jnp.maximum(count, jnp.ones((), x.dtype))


def _select(x: Array, y: Array, direction: Array, *, pooling: Pooling, cpu: str) -> Array:
    won, count = _winners(x, y, pooling)
    zero = jnp.zeros((), x.dtype)
    taps = _under(direction, pooling, fill=0.0)
    return functools.reduce(operator.add, map(lambda w, tap: jnp.where(w, tap, zero), won, taps)) / count


def _spread(x: Array, y: Array, gradient: Array, *, pooling: Pooling, cpu: str) -> Array:
    won, count = _winners(x, y, pooling)
    share, zero = gradient / count, jnp.zeros((), x.dtype)
    if pooling.strides == pooling.window and not any(map(any, pooling.padding)):
        return _spread_over_tiles(x, y, share, pooling.window)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    shares = [jnp.where(w, share, zero) for w in won]
    (result,) = jax.linear_transpose(lambda x: _under(x, pooling, fill=0.0), like)(shares)
    return jnp.asarray(result)


def _spread_over_tiles(x: Array, y: Array, share: Array, window: Pair) -> Array:
    """Where windows do not overlap: one pass over the input, in place of one a tap."""
    size, (rows, columns), (height, width) = x.shape[1:3], y.shape[1:3], window
    tiles = x[:, : rows * height, : columns * width].reshape(x.shape[0], rows, height, columns, width, -1)
    won = tiles == jnp.expand_dims(y, (2, 4))
    shares = jnp.where(won, jnp.expand_dims(share, (2, 4)), jnp.zeros((), x.dtype))
    inside = shares.reshape(x.shape[0], rows * height, columns * width, -1)
    outside = [(0, 0, 0), (0, size[0] - rows * height, 0), (0, size[1] - columns * width, 0), (0, 0, 0)]
    return lax.pad(inside, jnp.zeros((), x.dtype), outside)


def _spread_on_cpu(x: Array, y: Array, gradient: Array, *, pooling: Pooling, cpu: str) -> Array:
    if cpu == "xla" or x.dtype != jnp.float32:
        return _spread(x, y, gradient, pooling=pooling, cpu=cpu)
    output = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernels.call("cnnlib_max_pool_gradient", output, x, y, gradient, attributes=_pooling_attributes(pooling))


max_pool_p = define("max_pool", _pooled_shape, _max_pool_on_cpu, _max_pool)
select_p = define("select", _pooled_shape, _select, _select)
spread_p = define("spread", lambda x, *_, pooling, cpu: x.shape, _spread_on_cpu, _spread)


def _max_pool_jvp(primals: Any, tangents: Any, **static: Any) -> tuple[Array, Any]:
    (x,), (direction,) = primals, tangents
    y = max_pool_p.bind(x, **static)
    if isinstance(direction, ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, select_p.bind(x, y, direction, **static)


ad.primitive_jvps[max_pool_p] = _max_pool_jvp
# Who wins does not change with a small step, so only the last operand has a derivative.
for _primitive, _transpose in ((select_p, spread_p), (spread_p, select_p)):
    _rule = functools.partial(lambda primitive, direction, x, y, _, **static: primitive.bind(x, y, direction, **static))
    ad.defjvp(_primitive, None, None, functools.partial(_rule, _primitive))

    def _transposed(transpose: Primitive, gradient: Any, x: Array, y: Array, _: Any, **static: Any) -> list[Any]:
        return [None, None, gradient if isinstance(gradient, ad.Zero) else transpose.bind(x, y, gradient, **static)]

    ad.primitive_transposes[_primitive] = functools.partial(_transposed, _transpose)


def _batch_images(primitive: Primitive, operands: Any, axes: Any, **static: Any) -> tuple[Array, int]:
    """The mapped axis becomes images: pooling treats each alike."""
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    merged = [_merged(operand, axis, size, into=0) for operand, axis in zip(operands, axes, strict=True)]
    result = primitive.bind(*merged, **static)
    return result.reshape(size, merged[0].shape[0] // size if size else 0, *result.shape[1:]), 0


for _primitive in (max_pool_p, select_p, spread_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch_images, _primitive)
