"""Compile an arm's programs ahead of time.

A program runs several lanes (models) at a time: as many as run fast together and fit in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled
from jaxtyping import PyTree

from cnnlib.config.resolve import TrainedArm
from cnnlib.config.schema import LaneNumbers
from cnnlib.errors import UserError
from cnnlib.nn.network import network
from cnnlib.ops import kernels
from cnnlib.spec.layers import Connectivity, Full, Local
from cnnlib.spec.model import Model, walk
from cnnlib.spec.window import Shape
from cnnlib.system import machine
from cnnlib.system.cache import cache_folder, refusal
from cnnlib.train import checkpoint, evaluate, sharding, step, types
from cnnlib.train.multihost import ALONE, Hosts
from cnnlib.train.sharding import Spread
from cnnlib.train.types import Examples, Recipe, State

CPU_GROUP = 8
"""Largest number of lanes of a full net that a CPU vectorises together. More lanes do not fit in the cache (`python -m
benchmarks lanes`)."""


TPU_GROUP = 16
"""Largest number of lanes of a full net that a TPU vectorises together. With 64 lanes, libtpu 0.0.42.1 has no room for
LeNet-300-100."""
TPU_SIGNAL_GROUP = 8
"""Largest number of lanes that a TPU vectorises together if the net is local or conv and its inputs are signals
(docs/accelerators.md)."""
EVALUATION_BYTES = 2**26
"""Largest number of bytes per evaluation batch. About 500 float32 examples of 105x105x3 take this number of bytes."""
COMPILERS = 2
"""Number of programs compiled at the same time. Each compilation takes memory and several threads."""
KEPT_FROM = 0.05
"""Seconds. A program that compiles in less time is not kept on disk."""
LITTLE_OPTIMISED = {"xla_backend_optimization_level": 1}
"""Compiler options for `initialize` on a CPU. Level 0 would round the initial weights differently."""
PLACE = step.Place(np.int32(0), np.int32(0), np.int32(0), np.int32(0), np.bool_(False))
"""A `Place` that only gives the data types."""


def preferred_at_a_time(connectivity: Connectivity, input_shape: Shape, lanes: int, platform: str) -> int:
    """Return how many lanes to vectorise together if memory does not matter.

    A net is full, local or conv: fully connected, locally connected or convolutional.

    - CPU: one lane of a local or conv net, because one lane keeps the cores busy; up to 8 lanes of a full net.
    - TPU: one lane of a local or conv net on images. Vectorising gains nothing there, because a TPU starts each
      operation at no cost. Vectorising even doubles the cycles, because lanes become groups of one convolution. Up to 8
      lanes of a local or conv net on signals; up to 16 lanes of a full net.
    - GPU: all lanes, because each kernel takes microseconds to start.

    All groups of lanes have nearly equal sizes.
    """
    has_windows, is_image = connectivity != "full", len(input_shape) == 3
    if platform == "cpu":
        most = 1 if has_windows else CPU_GROUP
    elif platform == "tpu":
        most = (1 if is_image else TPU_SIGNAL_GROUP) if has_windows else TPU_GROUP
    else:
        most = lanes
    return math.ceil(lanes / math.ceil(lanes / most))


def free_memory(device: jax.Device) -> int:
    """Return the bytes that programs may still take: nine tenths of the free memory of the device.

    If the device reports no memory limit, use the free memory of the host. The last tenth is for memory that the
    compiler does not count: the memory of other processes, and the scratch memory of kernels.cc (16 partial sums of a
    layer's kernel per lane).
    """
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return max(0, 9 * (int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0))) // 10)
    return 9 * machine.free_memory() // 10


def check_parameters_fit(arm: TrainedArm, devices: Sequence[jax.Device], hosts: Hosts = ALONE) -> None:
    """Raise UserError if the parameters of all lanes and the gradient of one lane together exceed the free memory."""
    spread = spread_of(arm, devices, hosts)
    lanes = len(arm.lanes)
    need = 4 * arm.count.parameters * (spread.lanes_a_device * spread.sharing + 1)
    if need > (free := free_memory(spread.own_device)):
        raise UserError(
            f"arm {arm.name}: {lanes} lanes of {arm.count.parameters:,} parameters need {size_text(need)}, "
            f"{size_text(free)} are free; fewer lanes (lanes.seed) may fit"
        )


def size_text(count: int) -> str:
    """Format a number of bytes as MiB or GiB."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


class Programs(NamedTuple):
    """The compiled programs of an arm; each call runs all lanes."""

    initialize: Compiled
    """Makes the initial states and the random keys."""
    epoch: Compiled
    predict: Compiled
    """Predicts the test examples."""
    fit: Compiled
    """Evaluates each lane on its own training examples."""
    validate: Compiled | None
    """Evaluates on validation examples; None if there are none."""
    distance: Compiled | None
    """Measures the distance from a convolution; None if no layer is a convolution made local or full."""
    snapshot: Compiled | None
    """Copies states and keys for a checkpoint; None if the arm keeps no checkpoints."""
    spread: Spread
    """How lanes are spread over devices."""
    at_a_time: int
    """Number of lanes vectorised together per device."""
    memory_bytes: int
    """Peak bytes of the largest program in one memory. The number is the compiler's, without resident examples."""
    compile_seconds: float


def memory_of(compiled: Compiled) -> int:
    """Return the bytes that a compiled program takes while it runs: arguments, results and temporary buffers."""
    sizes = compiled.memory_analysis()
    assert sizes is not None, "XLA counts the memory of programs on CPU, GPU and TPU"
    return int(
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )


class ExamplesOf(Protocol):
    """The part of a feed (`feeds.py`) that compilation needs."""

    is_streamed: bool

    def examples(self, arm: TrainedArm, spread: Spread) -> dict[str, Examples]:
        """Return, for each split, what the programs of an arm take: arrays on the devices, or the shapes of a chunk."""


def compile_programs(
    arm: TrainedArm, feed: ExamplesOf, devices: Sequence[jax.Device], before: int | None = None, hosts: Hosts = ALONE
) -> Programs:
    """Compile every program of an arm before its first call. Reduce the lanes at a time until all fit in memory.

    Args:
        arm: The arm to compile. Its `precision` overrides JAX's own setting.
        feed: The source of the arm's examples.
        devices: The devices to spread the lanes over. Each holds all examples, or a chunk of them.
        before: How many lanes ran at a time in the earlier session that this session resumes; None: no earlier session.
        hosts: The processes of the run. All of them compile together.

    Raises:
        UserError: Not even one lane at a time fits, or `lanes.at_a_time` lanes do not fit. The message then says how
            many lanes fit.
    """
    start = time.perf_counter()
    with jax.default_matmul_precision(arm.experiment.precision), ThreadPoolExecutor(COMPILERS) as pool:
        compiler = _Compiler(arm, feed, spread_of(arm, devices, hosts), pool)
        initialize, snapshot = compiler.initialize(), compiler.snapshot()
        compiled, at_a_time, need = _fitting(compiler, before, hosts)
        return Programs(
            initialize.result(),
            compiled["train"],
            compiled["test"],
            compiled["fit"],
            compiled.get("validation"),
            compiled.get("distance"),
            None if snapshot is None else snapshot.result(),
            compiler.spread,
            at_a_time,
            need,
            time.perf_counter() - start,
        )


def _fitting(compiler: _Compiler, before: int | None, hosts: Hosts) -> tuple[dict[str, Compiled], int, int]:
    """Reduce the lanes at a time until the programs fit. Return the programs, the lanes at a time, and the bytes."""
    arm, spread, chunks = compiler.arm, compiler.spread, compiler.chunk_bytes
    wanted, most = arm.experiment.lanes.at_a_time, spread.lanes_a_device
    preferred = preferred_at_a_time(arm.model.connectivity, arm.input_shape, most, spread.own_device.platform)
    at_a_time = min(wanted or before or preferred, most)
    too_many: str | None = None
    while True:
        compiled = compiler.for_lanes(at_a_time)
        need = compiler.need(compiled) * spread.sharing + chunks
        # Measure the free memory after compilation: the compiled programs take memory too, and a `ulimit` counts it.
        # All hosts use the lowest value per device, so all hosts choose the same number of lanes.
        free = hosts.lowest(max(0, free_memory(spread.own_device) - chunks) // spread.sharing) * spread.sharing + chunks
        if need <= free:
            break
        each = f" on each of {len(spread.devices)} devices" if len(spread.devices) > 1 else ""
        needs = (
            f"arm {arm.name}: {len(arm.lanes)} lanes, {at_a_time} at a time{each}, need {size_text(need)}, "
            f"{size_text(free)} are free"
        )
        if at_a_time == 1:
            fits = "fewer lanes (lanes.seed) or a smaller batch_size may fit"
            raise UserError(f"{too_many}; nor does one at a time: {fits}" if too_many else f"{needs}; {fits}")
        too_many = too_many or needs
        at_a_time = max(1, min(at_a_time // 2, at_a_time * (free - chunks) // (need - chunks)))
    if wanted and too_many:
        raise UserError(f"{too_many}; {at_a_time} at a time would fit: lanes.at_a_time={at_a_time}")
    return compiled, at_a_time, need


class _Compiler:
    """Compile an arm's programs. While a thread compiles or loads a program, the next program is traced."""

    def __init__(self, arm: TrainedArm, feed: ExamplesOf, spread: Spread, pool: ThreadPoolExecutor) -> None:
        self.arm, self.spread, self._pool = arm, spread, pool
        self._recipe, self._numbers = recipe_of(arm, spread), shapes(spread.filled(numbers_of(arm)))
        self._splits, self._is_streamed = feed.examples(arm, spread), feed.is_streamed
        self.chunk_bytes = 3 * size_of(self._splits["train"]) if feed.is_streamed else 0
        """Bytes of the three chunks that a stream has in memory. Devices with one memory share these chunks."""

    def _compile(self, program: Any, *arguments: Any, options: Any = None) -> Future[Compiled]:
        return self._pool.submit(program.lower(*arguments).compile, options)

    def _mapped(self, function: Any, at_a_time: int, lanes: int = 2, shared: int = 1, **options: Any) -> Any:
        """Map a function: its first `lanes` arguments have a lane axis; all lanes share the next `shared`."""
        return self.spread.compiled_for(step.over_lanes(function, at_a_time, lanes), lanes, shared, **options)

    def initialize(self) -> Future[Compiled]:
        """Compile the program that makes the initial states and the keys.

        The program runs only once, so it is neither vectorised nor much optimised. This makes compilation far
        faster and does not change the results.
        """
        initialize = self.spread.compiled_for(step.over_lanes(begin(self._recipe), at_a_time=1))
        self._states, self._keys = jax.eval_shape(initialize, self._numbers)
        on_cpu = self.spread.own_device.platform == "cpu"
        return self._compile(initialize, self._numbers, options=LITTLE_OPTIMISED if on_cpu else None)

    def snapshot(self) -> Future[Compiled] | None:
        """Compile the program that copies the states for a checkpoint; None if the arm keeps no checkpoints."""
        if not self.arm.experiment.checkpoint.every:
            return None
        return self._compile(self.spread.compiled_for(checkpoint.snapshot), (self._states, self._keys))

    def for_lanes(self, at_a_time: int) -> dict[str, Compiled]:
        """Compile the programs that train and evaluate `at_a_time` lanes together per device; return them by name."""
        recipe, splits, batch = self._recipe, self._splits, evaluation_batch(self.arm)
        states, numbers, model = self._states, self._numbers, (self._states.parameters, self._states.statistics)
        predict = self._mapped(evaluate.predict(recipe, batch), at_a_time)
        compiling = {"test": self._compile(predict, *model, splits["test"])}
        if self._is_streamed:
            place = shapes(PLACE)
            chunk = self._mapped(step.chunk(recipe, self.arm.steps), at_a_time, shared=2, donate_argnums=0)
            compiling["train"] = self._compile(chunk, states, numbers, splits["train"], place)
            first = self._mapped(evaluate.evaluate_first(recipe, batch), at_a_time, shared=2)
            compiling["fit"] = self._compile(first, *model, splits["train"], place.steps)
        else:
            epoch = self._mapped(step.epoch(recipe), at_a_time, donate_argnums=0)
            compiling["train"] = self._compile(epoch, states, numbers, splits["train"])
            fit = self._mapped(evaluate.fit(recipe, batch), at_a_time, lanes=3)
            compiling["fit"] = self._compile(fit, *model, numbers, splits["train"])
        if "validation" in splits and self._is_streamed:  # chunks of all splits have the same shape
            compiling["validation"] = compiling["fit"]
        elif "validation" in splits:
            validate = self._mapped(evaluate.evaluate(recipe, batch), at_a_time)
            compiling["validation"] = self._compile(validate, *model, splits["validation"])
        if has_freed_weights(self.arm.model):
            distance = self._mapped(evaluate.distance_from_conv(recipe), 1, lanes=1, shared=0)
            compiling["distance"] = self._compile(distance, states.parameters)
        return {name: program.result() for name, program in compiling.items()}

    def need(self, compiled: dict[str, Compiled]) -> int:
        """Return the bytes that the largest program takes per device, without the examples.

        The examples are on the device already, so they are not part of the free memory either. If the arm keeps
        checkpoints, add a copy of the states: the copy may wait to be written while the next epoch runs.
        """
        part = {"train": "train", "fit": "train", "test": "test", "validation": "validation"}
        own = max(
            memory_of(program) - (size_of(self._splits[part[name]]) if name in part else 0)
            for name, program in compiled.items()
        )
        waiting = size_of(self._states) // len(self.spread.devices) if self.arm.experiment.checkpoint.every else 0
        return own + waiting


def begin(recipe: Recipe) -> Callable[[LaneNumbers], tuple[State, types.Keys]]:
    """Return a function that makes the initial state and the random keys of a model. The keys are 32-bit words.

    The model's seeds determine the keys. Checkpoints store the keys, so that a resumed run can compare them.
    """
    initialize = step.initialize(recipe)
    return lambda numbers: (initialize(numbers), types.Keys(*map(jax.random.key_data, step.keys_of(numbers))))


def state_shapes(arm: TrainedArm, spread: Spread) -> tuple[State, types.Keys]:
    """Return the shapes and shardings of what a checkpoint of an arm stores. Compile nothing."""
    numbers = spread.filled(numbers_of(arm))
    made: tuple[State, types.Keys]
    made = jax.eval_shape(step.over_lanes(begin(recipe_of(arm)), at_a_time=1), numbers)
    shape: Any = jax.ShapeDtypeStruct
    made = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=spread.by_lane), made)
    return made


def has_freed_weights(model: Model) -> bool:
    """Return whether any layer is a convolution with connectivity `local` or `full`."""
    return any(isinstance(layer, Local | Full) for layer in walk(model.layers))


def evaluation_batch(arm: TrainedArm) -> int:
    """Return the number of examples per evaluation batch: at most 500, and at most as many as fit in `EVALUATION_BYTES`
    as float32 values.

    If `accumulate` cuts training batches into pieces, an evaluation batch is at most as large as one piece.
    """
    one = arm.experiment
    fitting = EVALUATION_BYTES // (4 * math.prod(arm.input_shape))
    most = one.batch_size // one.accumulate if one.accumulate > 1 else 500
    return max(1, min(500, fitting, most))


def shapes(tree: PyTree) -> PyTree:
    """Return the shapes and dtypes of a tree of arrays."""
    shape: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda array: shape(array.shape, array.dtype), tree)


def size_of(tree: PyTree) -> int:
    """Return the total bytes of a tree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def numbers_of(arm: TrainedArm) -> LaneNumbers:
    """Return the seeds and hyperparameters of all lanes of an arm, one array per field."""
    columns = zip(*arm.lanes, strict=True)
    seeds = ("seed", "order_seed")
    kinds = (np.uint32 if name in seeds else np.float32 for name in LaneNumbers._fields)
    return LaneNumbers(*(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))  # type: ignore[arg-type]


def spread_of(arm: TrainedArm, devices: Sequence[jax.Device], hosts: Hosts = ALONE) -> Spread:
    """Spread an arm's lanes over devices. Raise UserError if the arm's `mesh` is not possible."""
    one = arm.experiment
    asked = None if one.mesh is None else (one.mesh[0], one.mesh[1])
    # Divide by `accumulate` first: each device that shares a batch must cut its rows into that many equal pieces.
    return sharding.spread(len(arm.lanes), devices, one.batch_size // one.accumulate, asked, hosts)


def recipe_of(arm: TrainedArm, spread: Spread | None = None) -> Recipe:
    """Return the static settings of an arm's training. Arms with equal recipes, data and lanes share programs."""
    experiment = arm.experiment
    dtype = jnp.dtype(experiment.compute_dtype)
    shards, data_axis = (1, None) if spread is None else (spread.shards, spread.data_axis)
    return Recipe(
        network(arm.model, dtype, data_axis),
        arm.input_shape,
        experiment.optim,
        experiment.augment,
        experiment.batch_size,
        experiment.epochs,
        experiment.data.train,
        experiment.reshuffle,
        experiment.passes,
        experiment.accumulate,
        shards,
        data_axis,
        experiment.remat,
        start=None if arm.start is None else network(arm.model.with_connectivity(arm.start), dtype),
    )


@contextlib.contextmanager
def compile_cache(wanted: bool, says: Callable[[str], None]) -> Iterator[None]:
    """Within this context, keep compiled programs in the user's cache folder, one subfolder per kind of processor.

    If `wanted` is false, keep no programs. The user's settings `JAX_COMPILATION_CACHE_DIR` and
    `JAX_ENABLE_COMPILATION_CACHE` stay in force. If the folder cannot be written, or if other users could put machine
    code there, keep nothing and tell the user through `says`. A program in the folder may be damaged, for example if
    a run was killed. In that case, delete the files of the damaged program and tell the user.
    """
    settings: Any = jax.config
    folder: Path | None = None
    values: dict[str, Any] = {} if wanted else {"jax_enable_compilation_cache": False}
    if wanted and settings.jax_enable_compilation_cache and settings.jax_compilation_cache_dir is None:
        folder = cache_folder("programs") / hashlib.sha256(kernels.processor().encode()).hexdigest()[:16]
        if (reason := refusal(folder)) is None:
            values = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": KEPT_FROM}
        else:
            says(f"{reason}: compiled programs are not kept")
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            settings.update(name, value)
        compilation_cache.reset_cache()  # JAX reads the settings only at its first compilation
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for name, value in before.items():
            settings.update(name, value)
        compilation_cache.reset_cache()
    damaged = set()
    for warning in caught:
        found = re.search(r"reading persistent compilation cache entry for '([\w-]+)'", str(warning.message))
        if found and folder:
            damaged.add(found[1])
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for name in damaged:
        for path in folder.glob(f"{name}-*") if folder else ():
            with contextlib.suppress(OSError):  # another process deleted it first
                path.unlink()
    if damaged:
        says(f"compiled programs in {folder} were damaged: they are thrown away")
