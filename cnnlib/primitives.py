"""What the operations are made of: JAX primitives with derivative, batching and lowering rules of their own.

A correlation is linear in its input and in its kernel, and so is each of its derivatives. They form a closed family of
three, `correlate`, `input_gradient` and `kernel_gradient`, from which JAX takes derivatives of any order, forward and
reverse. A local layer has such a family too: `local`, `local_input` and `local_kernel`. Max pooling is linear in a
direction once its winners are known: `select` follows them, `spread` is its transpose.

Each carries lanes: `x` is `(lane, image, height, width, channel)`, a kernel `(lane, height, width, channel, feature)`.
`jax.vmap` adds to the lanes (or to the images, where lanes share a kernel). What a primitive runs as, and how its lanes
run, is chosen by platform: `cnnlib/lowerings.py`.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from cnnlib import kernels, lowerings
from cnnlib.errors import UserError
from cnnlib.geometry import Correlation, Pair, Pooling

Lowering = Callable[..., Array]


def correlate(
    x: Float[Array, "lane image height width channel"],
    kernel: Float[Array, "lane kernel_height kernel_width channel feature"],
    correlation: Correlation,
) -> Float[Array, "lane image output_height output_width feature"]:
    """Correlate each lane's images with its kernel."""
    result: Array = correlate_p.bind(x, kernel, correlation=correlation, form=form_in_use())
    return result


def correlate_max(
    x: Float[Array, "lane image height width channel"],
    kernel: Float[Array, "lane kernel_height kernel_width channel feature"],
    correlation: Correlation,
    pooling: Pooling,
) -> Float[Array, "lane image row column feature"]:
    """Correlate, and take the largest value under each window. Only where `lowerings.pools_within`."""
    largest, _ = correlate_max_p.bind(x, kernel, correlation=correlation, pooling=pooling, form=form_in_use())
    result: Array = largest
    return result


def pools_within(dtype: Any, pooling: Pooling) -> bool:
    """Whether `correlate_max` serves for what is traced next."""
    return lowerings.pools_within(form_in_use(), dtype, pooling)


def correlate_back(
    y: Float[Array, "lane image output_height output_width feature"],
    kernel: Float[Array, "lane kernel_height kernel_width channel feature"],
    size: Pair,
    correlation: Correlation,
) -> Float[Array, "lane image height width channel"]:
    """Take each lane's maps back to images of `size`: the transpose of `correlate` in its input."""
    result: Array = input_gradient_p.bind(y, kernel, size=size, correlation=correlation, form=form_in_use())
    return result


def local(
    x: Float[Array, "lane image height width channel"],
    kernel: Float[Array, "lane row column kernel_height kernel_width channel feature"],
    correlation: Correlation,
) -> Float[Array, "lane image row column feature"]:
    """Correlate each lane's images with the lane's kernel for each position; `x_dilation` must be 1."""
    result: Array = local_p.bind(x, kernel, correlation=correlation, form=form_in_use())
    return result


def max_pool(
    x: Float[Array, "image height width channel"], pooling: Pooling
) -> Float[Array, "image rows columns channel"]:
    """Take the largest value under each window."""
    result: Array = max_pool_p.bind(x, pooling=pooling, form=form_in_use())
    return result


COMPILED_FOR: ContextVar[kernels.Kernels | None] = ContextVar("COMPILED_FOR", default=None)
"""The form of what is traced next, where it is not that of JAX's default device."""


@contextlib.contextmanager
def compiled_for(form: kernels.Kernels | None) -> Iterator[None]:
    """Inside, what is traced takes this form; None is that of JAX's default device."""
    token = COMPILED_FOR.set(form)
    try:
        yield
    finally:
        COMPILED_FOR.reset(token)


def form_in_use() -> kernels.Kernels:
    """Return the form of what is traced next: that of the device compiled for, or what `CNNLIB_KERNELS` asks for, or
    that of JAX's default device.

    Raises UserError where `CNNLIB_KERNELS` asks for a CPU's form on another device.
    """
    if (form := COMPILED_FOR.get()) is not None:
        return form
    backend = jax.default_backend()
    if backend == "cpu":
        return kernels.chosen()
    if (asked := kernels.asked()) in ("native", "xla"):
        raise UserError(
            f"CNNLIB_KERNELS={asked} is for CPUs, and JAX runs on a {backend} here; expected gpu, tpu or auto"
        )
    return asked or ("tpu" if backend == "tpu" else "gpu")


def define(
    name: str, shape: Callable[..., tuple[int, ...]], cpu: Any, gpu: Any, tpu: Any, winners: bool = False
) -> Primitive:
    """Define a primitive whose result has the type of its operands. Integers among these say who won a pooling.

    Where the static argument `form` is `gpu` or `tpu`, each platform runs that one; else its own. A sum over nothing is
    zero: operands or results without elements reach no lowering. With `winners` it has a second result, integers of the
    same shape.
    """
    primitive = Primitive(f"cnnlib_{name}")
    primitive.multiple_results = winners

    def abstract(*avals: Any, **static: Any) -> Any:
        types = {aval.dtype for aval in avals if jnp.issubdtype(aval.dtype, jnp.floating)}
        if len(types) > 1:
            raise TypeError(f"{primitive} takes operands of one type, not {', '.join(str(a.dtype) for a in avals)}")
        result = ShapedArray(shape(*avals, **static), avals[0].dtype)
        return [result, result.update(dtype=jnp.dtype(jnp.int32))] if winners else result

    def lowered(own: Lowering) -> Any:
        def of(*operands: Array, form: kernels.Kernels, **static: Any) -> Any:
            size = shape(*operands, form=form, **static)
            if 0 in size or any(0 in operand.shape for operand in operands):
                nothing = jnp.zeros(size, operands[0].dtype)
                return (nothing, nothing.astype(jnp.int32)) if winners else nothing
            return forms.get(form, own)(*operands, form=form, **static)

        return mlir.lower_fun(of, multiple_results=winners)

    forms: dict[str, Lowering] = {"gpu": gpu, "tpu": tpu}
    primitive.def_abstract_eval(abstract)
    # Outside jit an operation is a program of its own, also where `jax.disable_jit` asks for operations one by one.
    compiled = functools.cache(lambda static: jax.jit(lambda *operands: primitive.bind(*operands, **dict(static))))

    def run(*operands: Array, **static: Any) -> Any:
        with jax.disable_jit(False):
            return compiled(tuple(static.items()))(*operands)

    primitive.def_impl(run)
    mlir.register_lowering(primitive, lowered(cpu), platform="cpu")
    mlir.register_lowering(primitive, lowered(tpu), platform="tpu")
    mlir.register_lowering(primitive, lowered(gpu))
    return primitive


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def define_family(forward: Primitive, to_input: Primitive, to_kernel: Primitive, window: slice) -> None:
    """Give derivatives to three primitives, each linear in its first two operands and each the others' transpose.

    These are `forward(x, kernel)`, `to_input(gradient, kernel)` and `to_kernel(x, gradient)`. Operands after the first
    two are handed on. `window` is where the kernel's shape has its taps.
    """

    def of_forward(gradient: Any, x: Any, kernel: Any, *others: Any, **static: Any) -> tuple[Any, Any]:
        return (
            lambda: to_input.bind(gradient, kernel, *others, size=x.aval.shape[2:4], **static),
            lambda: to_kernel.bind(x, gradient, *others, window=kernel.aval.shape[window], **static),
        )

    def of_input(direction: Any, gradient: Any, kernel: Any, *others: Any, size: Pair, **static: Any) -> Any:
        return (
            lambda: forward.bind(direction, kernel, *others, **static),
            lambda: to_kernel.bind(direction, gradient, *others, window=kernel.aval.shape[window], **static),
        )

    def of_kernel(direction: Any, x: Any, gradient: Any, *others: Any, window: Pair, **static: Any) -> Any:
        return (
            lambda: to_input.bind(gradient, direction, *others, size=x.aval.shape[2:4], **static),
            lambda: forward.bind(x, direction, *others, **static),
        )

    for primitive, rules in ((forward, of_forward), (to_input, of_input), (to_kernel, of_kernel)):
        ad.primitive_jvps[primitive] = functools.partial(_bilinear_jvp, primitive)
        ad.primitive_transposes[primitive] = functools.partial(_bilinear_transpose, rules)


def _bilinear_jvp(primitive: Primitive, primals: Any, tangents: Any, **static: Any) -> tuple[Any, Any]:
    y = primitive.bind(*primals, **static)
    return y, _direction(primitive, y, primals, tangents, **static)


def _direction(primitive: Primitive, y: Array, primals: Any, tangents: Any, **static: Any) -> Any:
    """Return the derivative of a primitive that is linear in its first two operands. `y` is its result, or like it."""
    first, second, *others = primals
    parts = []
    if not _is_zero(tangents[0]):
        parts.append(primitive.bind(tangents[0], second, *others, **static))
    if not _is_zero(tangents[1]):
        parts.append(primitive.bind(first, tangents[1], *others, **static))
    return functools.reduce(operator.add, parts) if parts else ad.Zero(jax.typeof(y).to_tangent_aval())


def _bilinear_transpose(rules: Callable[..., Any], cotangent: Any, *operands: Any, **static: Any) -> list[Any]:
    first, *_ = operands
    found: list[Any] = [None] * len(operands)
    if not _is_zero(cotangent):
        to_first, to_second = rules(cotangent, *operands, **static)
        if ad.is_undefined_primal(first):
            found[0] = to_first()
        else:
            found[1] = to_second()
    return found


# Correlations: derivatives.

correlate_p = define(
    "correlate",
    lowerings.correlate_shape,
    cpu=lowerings.correlate_on_cpu,
    gpu=lowerings.correlate_on_gpu,
    tpu=lowerings.correlate_on_tpu,
)
input_gradient_p = define(
    "input_gradient",
    lowerings.input_gradient_shape,
    cpu=lowerings.input_gradient_on_cpu,
    gpu=lowerings.input_gradient_on_gpu,
    tpu=lowerings.input_gradient_on_tpu,
)
kernel_gradient_p = define(
    "kernel_gradient",
    lowerings.kernel_gradient_shape,
    cpu=lowerings.kernel_gradient_on_cpu,
    gpu=lowerings.kernel_gradient_on_gpu,
    tpu=lowerings.kernel_gradient_on_tpu,
)
define_family(correlate_p, input_gradient_p, kernel_gradient_p, window=slice(1, 3))

# A correlation and the max pooling behind it. Who wins does not change with a small step, so with the winners as an
# operand what is left is bilinear.

correlate_max_p = define(
    "correlate_max",
    lowerings.pooled_correlate_shape,
    cpu=lowerings.correlate_max_on_cpu,
    gpu=lowerings.correlate_max_elsewhere,
    tpu=lowerings.correlate_max_elsewhere,
    winners=True,
)
correlate_at_winners_p = define(
    "correlate_at_winners",
    lowerings.pooled_correlate_shape,
    cpu=functools.partial(lowerings.correlate_at_winners, on=lowerings.correlate_on_cpu),
    gpu=functools.partial(lowerings.correlate_at_winners, on=lowerings.correlate_on_gpu),
    tpu=functools.partial(lowerings.correlate_at_winners, on=lowerings.correlate_on_gpu),
)
pooled_input_gradient_p = define(
    "pooled_input_gradient",
    lowerings.pooled_input_gradient_shape,
    cpu=lowerings.pooled_input_gradient_on_cpu,
    gpu=lowerings.pooled_input_gradient_elsewhere,
    tpu=lowerings.pooled_input_gradient_elsewhere,
)
pooled_kernel_gradient_p = define(
    "pooled_kernel_gradient",
    lowerings.pooled_kernel_gradient_shape,
    cpu=lowerings.pooled_kernel_gradient_on_cpu,
    gpu=lowerings.pooled_kernel_gradient_elsewhere,
    tpu=lowerings.pooled_kernel_gradient_elsewhere,
)
define_family(correlate_at_winners_p, pooled_input_gradient_p, pooled_kernel_gradient_p, window=slice(1, 3))


def _correlate_max_jvp(primals: Any, tangents: Any, **static: Any) -> tuple[Any, Any]:
    largest, winners = correlate_max_p.bind(*primals, **static)
    direction = _direction(correlate_at_winners_p, largest, (*primals, winners), tangents, **static)
    return (largest, winners), (direction, ad.Zero(jax.typeof(winners).to_tangent_aval()))


ad.primitive_jvps[correlate_max_p] = _correlate_max_jvp

# Local layers: a correlation whose kernel is another one at each position, `(lane, row, column, kernel_height,
# kernel_width, channel, feature)`.

local_p = define(
    "local",
    lowerings.local_shape,
    cpu=lowerings.local_on_cpu("cnnlib_local_correlate", lowerings.local_shape, lowerings.LOCAL_ON_XLA_CPU.forward),
    gpu=lowerings.LOCAL_ON_GPU.forward,
    tpu=lowerings.LOCAL_ON_TPU.forward,
)
local_input_p = define(
    "local_input",
    lowerings.local_input_shape,
    cpu=lowerings.local_on_cpu(
        "cnnlib_local_input_gradient", lowerings.local_input_shape, lowerings.LOCAL_ON_XLA_CPU.input_gradient
    ),
    gpu=lowerings.LOCAL_ON_GPU.input_gradient,
    tpu=lowerings.LOCAL_ON_TPU.input_gradient,
)
local_kernel_p = define(
    "local_kernel",
    lowerings.local_kernel_shape,
    cpu=lowerings.local_on_cpu(
        "cnnlib_local_kernel_gradient", lowerings.local_kernel_shape, lowerings.LOCAL_ON_XLA_CPU.kernel_gradient
    ),
    gpu=lowerings.LOCAL_ON_GPU.kernel_gradient,
    tpu=lowerings.LOCAL_ON_TPU.kernel_gradient,
)
define_family(local_p, local_input_p, local_kernel_p, window=slice(3, 5))


def _one(operand: Array, axis: int | None) -> tuple[int, ...]:
    """The shape of one element along the mapped axis."""
    return operand.shape if axis is None else (*operand.shape[:axis], *operand.shape[axis + 1 :])


def _merged(operand: Array, axis: int | None, size: int, into: int) -> Array:
    """`operand` with the mapped axis (or copies) merged into its axis `into`, as the slower of the two."""
    moved = jnp.broadcast_to(operand[None], (size, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
    moved = jnp.moveaxis(moved, 0, into)
    return moved.reshape(*moved.shape[:into], size * moved.shape[into + 1], *moved.shape[into + 2 :])


def _batch_lanes(primitive: Primitive, operands: Any, axes: Any, **static: Any) -> tuple[Any, Any]:
    """The mapped axis becomes lanes, or images where nothing but the kernel is without it."""
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    into = 1 if primitive in WITH_KERNEL and axes[1] is None else 0
    merged = [
        operand if into == 1 and index == 1 else _merged(operand, axis, size, into)
        for index, (operand, axis) in enumerate(zip(operands, axes, strict=True))
    ]
    inner = _one(operands[0], axes[0])[into]
    results = primitive.bind(*merged, **static)
    split = lambda result: result.reshape(*result.shape[:into], size, inner, *result.shape[into + 1 :])  # noqa: E731
    if primitive.multiple_results:
        return [split(result) for result in results], [into] * len(results)
    return split(results), into


WITH_KERNEL = (
    correlate_p,
    input_gradient_p,
    correlate_max_p,
    correlate_at_winners_p,
    pooled_input_gradient_p,
    local_p,
    local_input_p,
)
"""Those whose second operand is a kernel."""

for _primitive in (*WITH_KERNEL, kernel_gradient_p, pooled_kernel_gradient_p, local_kernel_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch_lanes, _primitive)


# Max pooling: its largest values, the direction that follows the winners, and the gradient that goes back to them.

max_pool_p = define(
    "max_pool",
    lowerings.pooled_shape,
    cpu=lowerings.max_pool_on_cpu,
    gpu=lowerings.max_pool,
    tpu=lowerings.max_pool,
)
select_p = define("select", lowerings.pooled_shape, *3 * (lowerings.select,))
spread_p = define(
    "spread",
    lambda x, *_, pooling, form: x.shape,
    cpu=lowerings.spread_on_cpu,
    gpu=lowerings.spread,
    tpu=lowerings.spread,
)


def _max_pool_jvp(primals: Any, tangents: Any, *, pooling: Pooling, form: kernels.Kernels) -> tuple[Array, Any]:
    (x,), (direction,) = primals, tangents
    y = max_pool_p.bind(x, pooling=pooling, form=form)
    if isinstance(direction, ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    shares = y
    if lowerings.keeps_shares(form):
        # Else the compiler would find them where the gradient is, in another pass over the input.
        y, shares = lax.optimization_barrier((y, lowerings.winner_shares(x, y, pooling)))
    return y, select_p.bind(x, y, shares, direction, pooling=pooling, form=form)


ad.primitive_jvps[max_pool_p] = _max_pool_jvp
# Who wins does not change with a small step, so only the last operand has a derivative.
for _primitive, _transpose in ((select_p, spread_p), (spread_p, select_p)):
    _rule = functools.partial(
        lambda primitive, direction, x, y, shares, _, **static: primitive.bind(x, y, shares, direction, **static)
    )
    ad.defjvp(_primitive, None, None, None, functools.partial(_rule, _primitive))

    def _transposed(
        transpose: Primitive, gradient: Any, x: Array, y: Array, shares: Array, _: Any, **static: Any
    ) -> list[Any]:
        if not isinstance(gradient, ad.Zero):
            gradient = transpose.bind(x, y, shares, gradient, **static)
        return [None, None, None, gradient]

    ad.primitive_transposes[_primitive] = functools.partial(_transposed, _transpose)


def _batch_images(primitive: Primitive, operands: Any, axes: Any, **static: Any) -> tuple[Array, int]:
    """The mapped axis becomes images: pooling treats each alike."""
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    merged = [_merged(operand, axis, size, into=0) for operand, axis in zip(operands, axes, strict=True)]
    result = primitive.bind(*merged, **static)
    return result.reshape(size, _one(operands[0], axes[0])[0], *result.shape[1:]), 0


for _primitive in (max_pool_p, select_p, spread_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch_images, _primitive)
