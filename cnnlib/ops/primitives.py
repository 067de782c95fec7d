"""JAX primitives behind the operations, with their own rules for derivatives, batching and lowering.

A correlation is linear in its input and in its kernel, and so are its derivatives. Three primitives therefore suffice
for derivatives of any order, forward and reverse: `correlate`, `input_gradient` and `kernel_gradient`. Local layers
have three primitives too: `local`, `local_input` and `local_kernel`. In max pooling, the winners of a window are the
positions of its largest value. For given winners, the derivative of max pooling is linear: `select` averages the
tangents of the winners, and `spread` is the transpose of `select`.

A lane is one of several models that run together. Except in max pooling, operands have a lane axis: `x` is `(lane,
image, height, width, channel)`, and a kernel is `(lane, height, width, channel, feature)`. `jax.vmap` adds lanes, or
images if the kernel is not mapped. `cnnlib/ops/lowerings/` defines how each platform runs a primitive and its lanes.
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

from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.ops.geometry import Correlation, Pair, Pooling
from cnnlib.ops.lowerings import correlations, fused_pooling, local_layers, poolings

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
    """Correlate and max-pool in one operation. Call this function only if `pools_within` returns True."""
    largest, _ = correlate_max_p.bind(x, kernel, correlation=correlation, pooling=pooling, form=form_in_use())
    result: Array = largest
    return result


def pools_within(dtype: Any, pooling: Pooling) -> bool:
    """Return whether `correlate_max` supports this type and pooling in the current form (`form_in_use`)."""
    return fused_pooling.pools_within(form_in_use(), dtype, pooling)


def correlate_back(
    y: Float[Array, "lane image output_height output_width feature"],
    kernel: Float[Array, "lane kernel_height kernel_width channel feature"],
    size: Pair,
    correlation: Correlation,
) -> Float[Array, "lane image height width channel"]:
    """Map the output of `correlate` back to images of `size`: the transpose of `correlate` with respect to `x`."""
    result: Array = input_gradient_p.bind(y, kernel, size=size, correlation=correlation, form=form_in_use())
    return result


def local(
    x: Float[Array, "lane image height width channel"],
    kernel: Float[Array, "lane row column kernel_height kernel_width channel feature"],
    correlation: Correlation,
) -> Float[Array, "lane image row column feature"]:
    """Correlate each lane's images with separate weights at every position. `x_dilation` must be 1."""
    result: Array = local_p.bind(x, kernel, correlation=correlation, form=form_in_use())
    return result


def max_pool(
    x: Float[Array, "image height width channel"], pooling: Pooling
) -> Float[Array, "image rows columns channel"]:
    """Return the largest value in each window."""
    result: Array = max_pool_p.bind(x, pooling=pooling, form=form_in_use())
    return result


COMPILED_FOR: ContextVar[kernels.Kernels | None] = ContextVar("COMPILED_FOR", default=None)
"""The form in which to trace operations: `native`, `xla`, `gpu` or `tpu`. None: see `form_in_use`."""


@contextlib.contextmanager
def compiled_for(form: kernels.Kernels | None) -> Iterator[None]:
    """Inside the `with` block, trace operations in `form`. None: `CNNLIB_KERNELS` or JAX's device selects the form."""
    token = COMPILED_FOR.set(form)
    try:
        yield
    finally:
        COMPILED_FOR.reset(token)


def form_in_use() -> kernels.Kernels:
    """Return the form in which operations are traced now.

    The argument of `compiled_for` has priority, then `CNNLIB_KERNELS`. If neither is set, JAX's default device
    determines the form. Raises UserError if `CNNLIB_KERNELS` is `native` or `xla` and that device is not a CPU.
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
    """Define a primitive whose result has the floating-point type of its operands. Integer operands hold winners.

    `cpu`, `gpu` and `tpu` are the lowerings for these platforms. If the static argument `form` is `gpu` or `tpu`, all
    platforms run the lowering of that name. For other forms, each platform runs its own lowering. If an operand or the
    result has no elements, no lowering runs and the result is zero. If `winners` is True, the primitive has a second
    result: the winners, as integers of the same shape.
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
    # Outside jit, each operation is compiled as its own program, even under `jax.disable_jit`.
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
    """Register the derivatives of `forward(x, kernel)`, `to_input(gradient, kernel)` and `to_kernel(x, gradient)`.

    Each of these primitives is linear in its first two operands. Its two transposes are the other two primitives.
    Further operands are passed on unchanged. `window` is the slice of the kernel's shape that holds the window.
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
    """Return the tangent of `y`, the result of a primitive that is linear in its first two operands."""
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


# Correlations.

correlate_p = define(
    "correlate",
    correlations.correlate_shape,
    cpu=correlations.correlate_on_cpu,
    gpu=correlations.correlate_on_gpu,
    tpu=correlations.correlate_on_tpu,
)
input_gradient_p = define(
    "input_gradient",
    correlations.input_gradient_shape,
    cpu=correlations.input_gradient_on_cpu,
    gpu=correlations.input_gradient_on_gpu,
    tpu=correlations.input_gradient_on_tpu,
)
kernel_gradient_p = define(
    "kernel_gradient",
    correlations.kernel_gradient_shape,
    cpu=correlations.kernel_gradient_on_cpu,
    gpu=correlations.kernel_gradient_on_gpu,
    tpu=correlations.kernel_gradient_on_tpu,
)
define_family(correlate_p, input_gradient_p, kernel_gradient_p, window=slice(1, 3))

# A correlation followed by max pooling. A small change of the operands does not change the winners. The derivatives
# therefore take the winners as a fixed operand and are linear in each of the other two.

correlate_max_p = define(
    "correlate_max",
    fused_pooling.pooled_correlate_shape,
    cpu=fused_pooling.correlate_max_on_cpu,
    gpu=fused_pooling.correlate_max_elsewhere,
    tpu=fused_pooling.correlate_max_elsewhere,
    winners=True,
)
correlate_at_winners_p = define(
    "correlate_at_winners",
    fused_pooling.pooled_correlate_shape,
    cpu=functools.partial(fused_pooling.correlate_at_winners, on=correlations.correlate_on_cpu),
    gpu=functools.partial(fused_pooling.correlate_at_winners, on=correlations.correlate_on_gpu),
    tpu=functools.partial(fused_pooling.correlate_at_winners, on=correlations.correlate_on_gpu),
)
pooled_input_gradient_p = define(
    "pooled_input_gradient",
    fused_pooling.pooled_input_gradient_shape,
    cpu=fused_pooling.pooled_input_gradient_on_cpu,
    gpu=fused_pooling.pooled_input_gradient_elsewhere,
    tpu=fused_pooling.pooled_input_gradient_elsewhere,
)
pooled_kernel_gradient_p = define(
    "pooled_kernel_gradient",
    fused_pooling.pooled_kernel_gradient_shape,
    cpu=fused_pooling.pooled_kernel_gradient_on_cpu,
    gpu=fused_pooling.pooled_kernel_gradient_elsewhere,
    tpu=fused_pooling.pooled_kernel_gradient_elsewhere,
)
define_family(correlate_at_winners_p, pooled_input_gradient_p, pooled_kernel_gradient_p, window=slice(1, 3))


def _correlate_max_jvp(primals: Any, tangents: Any, **static: Any) -> tuple[Any, Any]:
    largest, winners = correlate_max_p.bind(*primals, **static)
    direction = _direction(correlate_at_winners_p, largest, (*primals, winners), tangents, **static)
    return (largest, winners), (direction, ad.Zero(jax.typeof(winners).to_tangent_aval()))


ad.primitive_jvps[correlate_max_p] = _correlate_max_jvp

# Local layers: correlations with separate weights at every position. A kernel is `(lane, row, column, kernel_height,
# kernel_width, channel, feature)`.

local_p = define(
    "local",
    local_layers.local_shape,
    cpu=local_layers.local_on_cpu(
        "cnnlib_local_correlate", local_layers.local_shape, local_layers.LOCAL_ON_XLA_CPU.forward
    ),
    gpu=local_layers.LOCAL_ON_GPU.forward,
    tpu=local_layers.LOCAL_ON_TPU.forward,
)
local_input_p = define(
    "local_input",
    local_layers.local_input_shape,
    cpu=local_layers.local_on_cpu(
        "cnnlib_local_input_gradient", local_layers.local_input_shape, local_layers.LOCAL_ON_XLA_CPU.input_gradient
    ),
    gpu=local_layers.LOCAL_ON_GPU.input_gradient,
    tpu=local_layers.LOCAL_ON_TPU.input_gradient,
)
local_kernel_p = define(
    "local_kernel",
    local_layers.local_kernel_shape,
    cpu=local_layers.local_on_cpu(
        "cnnlib_local_kernel_gradient", local_layers.local_kernel_shape, local_layers.LOCAL_ON_XLA_CPU.kernel_gradient
    ),
    gpu=local_layers.LOCAL_ON_GPU.kernel_gradient,
    tpu=local_layers.LOCAL_ON_TPU.kernel_gradient,
)
define_family(local_p, local_input_p, local_kernel_p, window=slice(3, 5))


def _one(operand: Array, axis: int | None) -> tuple[int, ...]:
    """Return the shape of `operand` without the mapped axis."""
    return operand.shape if axis is None else (*operand.shape[:axis], *operand.shape[axis + 1 :])


def _merged(operand: Array, axis: int | None, size: int, into: int) -> Array:
    """Merge the mapped axis, whose index changes more slowly, into axis `into`. If `axis` is None, merge copies."""
    moved = jnp.broadcast_to(operand[None], (size, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
    moved = jnp.moveaxis(moved, 0, into)
    return moved.reshape(*moved.shape[:into], size * moved.shape[into + 1], *moved.shape[into + 2 :])


def _batch_lanes(primitive: Primitive, operands: Any, axes: Any, **static: Any) -> tuple[Any, Any]:
    """Merge the mapped axis into the lanes, or into the images if the kernel is not mapped."""
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
"""Primitives whose second operand is a kernel."""

for _primitive in (*WITH_KERNEL, kernel_gradient_p, pooled_kernel_gradient_p, local_kernel_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch_lanes, _primitive)


# Max pooling has three primitives. `max_pool` returns the largest values. `select` averages the tangents of the
# winners. `spread` gives each winner its share of the gradient.

max_pool_p = define(
    "max_pool",
    poolings.pooled_shape,
    cpu=poolings.max_pool_on_cpu,
    gpu=poolings.max_pool,
    tpu=poolings.max_pool,
)
select_p = define("select", poolings.pooled_shape, *3 * (poolings.select,))
spread_p = define(
    "spread",
    lambda x, *_, pooling, form: x.shape,
    cpu=poolings.spread_on_cpu,
    gpu=poolings.spread,
    tpu=poolings.spread,
)


def _max_pool_jvp(primals: Any, tangents: Any, *, pooling: Pooling, form: kernels.Kernels) -> tuple[Array, Any]:
    (x,), (direction,) = primals, tangents
    y = max_pool_p.bind(x, pooling=pooling, form=form)
    if isinstance(direction, ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    shares = y
    if poolings.keeps_shares(form):
        # Without the barrier, the compiler would compute the shares in the backward pass and read the input again.
        y, shares = lax.optimization_barrier((y, poolings.winner_shares(x, y, pooling)))
    return y, select_p.bind(x, y, shares, direction, pooling=pooling, form=form)


ad.primitive_jvps[max_pool_p] = _max_pool_jvp
# `x`, `y` and `shares` only determine the winners, which a small change does not move. Therefore only the last operand
# has a derivative.
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
    """Merge the mapped axis into the images, because pooling treats all images alike."""
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    merged = [_merged(operand, axis, size, into=0) for operand, axis in zip(operands, axes, strict=True)]
    result = primitive.bind(*merged, **static)
    return result.reshape(size, _one(operands[0], axes[0])[0], *result.shape[1:]), 0


for _primitive in (max_pool_p, select_p, spread_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batch_images, _primitive)
