"""What an arm runs: its programs, compiled ahead, with as many lanes at a time as are fast and fit in the memory."""

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

from cnnlib import checkpoint, evaluation, kernels, machine, mesh, train
from cnnlib.cache import cache_folder, refusal
from cnnlib.config import LaneNumbers
from cnnlib.errors import UserError
from cnnlib.mesh import Spread
from cnnlib.models import network
from cnnlib.multihost import ALONE, Hosts
from cnnlib.resolve import TrainedArm
from cnnlib.spec import Connectivity, Full, Local, Model, Shape, walk
from cnnlib.train import Examples, Recipe, State

CPU_GROUP = 8
"""Lanes of a full net that gain from one another on a CPU; more outgrow its cache (`python -m benchmarks lanes`)."""


TPU_GROUP = 16
"""The same on a TPU; with 64 at a time libtpu 0.0.42.1 finds no room for LeNet-300-100."""
TPU_SIGNAL_GROUP = 8
"""Lanes of a net with windows on signals that are vectorised on a TPU (docs/accelerators.md)."""
EVALUATION_BYTES = 2**26
"""500 examples of 105x105x3 as float32."""
COMPILERS = 2
"""Programs that are compiled side by side. Each takes memory, and XLA gives each several threads."""
KEPT_FROM = 0.05
"""Seconds that a program took to compile, to be worth its place on the disk."""
LITTLE_OPTIMISED = {"xla_backend_optimization_level": 1}
"""Options of the CPU's compiler. Level 0 would round initial weights in another way."""
PLACE = train.Place(np.int32(0), np.int32(0), np.int32(0), np.int32(0), np.bool_(False))
"""Of the types of the numbers that say where a chunk lies."""


def preferred_at_a_time(connectivity: Connectivity, input_shape: Shape, lanes: int, platform: str) -> int:
    """Choose how many lanes are vectorised together where memory does not matter.

    - CPU: one lane of a net with windows, since it fills the cores; up to 8 lanes of a full net.
    - TPU: one lane of a net with windows on images. A core runs one operation after another at no cost for starting
      each, and lanes as the groups of one convolution take twice the cycles. Up to 8 lanes with windows on signals, up
      to 16 of a full net.
    - GPU: all lanes, since each kernel costs microseconds to start.

    Lanes come in groups of nearly equal size.
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
    """Bytes that programs may still take on the device: nine tenths of what its allocator, or the host, has free.

    The tenth is for what the compiler does not see: other processes, and the scratch of kernels.cc (16 partial sums of
    a layer's kernel a lane).
    """
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return max(0, 9 * (int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0))) // 10)
    return 9 * machine.free_memory() // 10


def check_parameters_fit(arm: TrainedArm, devices: Sequence[jax.Device], hosts: Hosts = ALONE) -> None:
    """Raises UserError where the parameters alone, with the gradient of one lane, are more than the memory has free."""
    spread = spread_of(arm, devices, hosts)
    lanes = len(arm.lanes)
    need = 4 * arm.count.parameters * (spread.lanes_a_device * spread.sharing + 1)
    if need > (free := free_memory(spread.own_device)):
        raise UserError(
            f"arm {arm.name}: {lanes} lanes of {arm.count.parameters:,} parameters need {size_text(need)}, "
            f"{size_text(free)} are free; fewer lanes (lanes.seed) may fit"
        )


def size_text(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


class Programs(NamedTuple):
    """The compiled programs of an arm, all lanes at once."""

    initialize: Any
    """The states and the keys."""
    epoch: Any
    predict: Any
    """The answers to the test examples."""
    fit: Any
    """On the examples that each lane has trained on."""
    validate: Any
    """None without validation examples."""
    distance: Any
    """From a convolution; None where no layer is a local or full reading of one."""
    snapshot: Any
    """Of the states and keys together, for a checkpoint; None where there are to be none."""
    spread: Spread
    """The devices that have the lanes."""
    at_a_time: int
    """Lanes that run vectorised together on a device."""
    memory_bytes: int
    """What the largest of them takes of a memory at its peak beside the examples, by the compiler's own account."""
    compile_seconds: float


def memory_of(compiled: Any) -> int:
    """Bytes that a compiled program takes while it runs: arguments, results and temporary buffers."""
    sizes = compiled.memory_analysis()
    return int(
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )


class ExamplesOf(Protocol):
    """What programs need to know of where their examples come from, a feed (`feeds.py`)."""

    is_streamed: bool

    def examples(self, arm: TrainedArm, spread: Spread) -> dict[str, Examples]:
        """What the programs of an arm take of each part: arrays on its devices, or the shapes of a chunk."""


def compile_programs(
    arm: TrainedArm, feed: ExamplesOf, devices: Sequence[jax.Device], before: int | None = None, hosts: Hosts = ALONE
) -> Programs:
    """`compiled_in_precision` in the precision that the arm asks for, whatever JAX's own setting is."""
    with jax.default_matmul_precision(arm.experiment.precision), ThreadPoolExecutor(COMPILERS) as pool:
        return compiled_in_precision(arm, feed, devices, before, hosts, pool)


def compiled_in_precision(
    arm: TrainedArm,
    feed: ExamplesOf,
    devices: Sequence[jax.Device],
    before: int | None,
    hosts: Hosts,
    pool: ThreadPoolExecutor,
) -> Programs:
    """Compiles every program of an arm ahead of its first call, with as many lanes at a time as fit in the memory.

    While one program is compiled, or loaded from the cache, by a thread of `pool`, the next one is traced.
    The lanes are spread over the devices, each of which has the examples, or a chunk of them.
    `before` is how many there were in the session that this one goes on with. Raises UserError where one lane at a time
    does not fit, or not as many as `lanes.at_a_time` asks for, with the number that would.
    """
    lanes, wanted, device = len(arm.lanes), arm.experiment.lanes.at_a_time, devices[0]
    spread = spread_of(arm, devices, hosts)
    recipe, numbers = recipe_of(arm, spread), shapes(spread.filled(numbers_of(arm)))
    splits, tested_at_once = feed.examples(arm, spread), evaluation_batch(arm)
    place, chunks = shapes(PLACE), 3 * size_of(splits["train"]) if feed.is_streamed else 0
    most = spread.lanes_a_device
    at_a_time = min(
        wanted or before or preferred_at_a_time(arm.model.connectivity, arm.input_shape, most, device.platform), most
    )
    too_many: str | None = None
    start = time.perf_counter()

    def in_background(program: Any, *arguments: Any, options: Any = None) -> Future[Any]:
        return pool.submit(program.lower(*arguments).compile, options)

    # Initialising runs once, so it is neither vectorised nor much optimised: it compiles in a fraction of the time,
    # to the same bits.
    initialize = spread.compiled_for(train.over_lanes(begin(recipe), at_a_time=1))
    states, keys = jax.eval_shape(initialize, numbers)
    initial = in_background(initialize, numbers, options=LITTLE_OPTIMISED if device.platform == "cpu" else None)
    keep = None
    if arm.experiment.checkpoint.every:
        keep = in_background(spread.compiled_for(checkpoint.snapshot), (states, keys))
    model = (states.parameters, states.statistics)
    while True:

        def mapped(
            function: Callable[..., Any],
            lane_arguments: int,
            shared_arguments: int = 1,
            at_a_time: int = at_a_time,
            **options: Any,
        ) -> Any:
            own = train.over_lanes(function, at_a_time, lane_arguments)
            return spread.compiled_for(own, lane_arguments, shared_arguments, **options)

        predict = mapped(evaluation.predict(recipe, tested_at_once), 2)
        compiling = {"test": in_background(predict, *model, splits["test"])}
        if feed.is_streamed:
            chunk = mapped(train.chunk(recipe, arm.steps), 2, shared_arguments=2, donate_argnums=0)
            compiling["train"] = in_background(chunk, states, numbers, splits["train"], place)
            first = mapped(evaluation.evaluate_first(recipe, tested_at_once), 2, shared_arguments=2)
            compiling["fit"] = in_background(first, *model, splits["train"], place.steps)
        else:
            epoch = mapped(train.epoch(recipe), 2, donate_argnums=0)
            compiling["train"] = in_background(epoch, states, numbers, splits["train"])
            fit = mapped(evaluation.fit(recipe, tested_at_once), 3)
            compiling["fit"] = in_background(fit, *model, numbers, splits["train"])
        if "validation" in splits:
            if feed.is_streamed:  # chunks of all parts are alike
                compiling["validation"] = compiling["fit"]
            else:
                evaluate = mapped(evaluation.evaluate(recipe, tested_at_once), 2)
                compiling["validation"] = in_background(evaluate, *model, splits["validation"])
        compiled = {name: program.result() for name, program in compiling.items()}
        # The examples are on the device already: what a program takes includes them, what is free does not. Of a stream
        # there are three chunks, which devices of one memory share.
        own = max(
            memory_of(program) - size_of(splits["train" if name == "fit" else name])
            for name, program in compiled.items()
        )
        if has_freed_weights(arm.model):
            distance = spread.compiled_for(train.over_lanes(evaluation.distance_from_conv(recipe), at_a_time=1))
            compiled["distance"] = distance.lower(states.parameters).compile()
            own = max(own, memory_of(compiled["distance"]))
        # While an epoch runs, the state before it may wait to be written.
        own += size_of(states) // len(spread.devices) if keep else 0
        need = own * spread.sharing + chunks
        # By now the programs themselves have taken their part, which a `ulimit` counts. Hosts decide alike, by the one
        # that has the least for each of its devices.
        free = hosts.lowest(max(0, free_memory(spread.own_device) - chunks) // spread.sharing) * spread.sharing + chunks
        if need <= free:
            break
        each = f" on each of {len(spread.devices)} devices" if len(spread.devices) > 1 else ""
        needs = (
            f"arm {arm.name}: {lanes} lanes, {at_a_time} at a time{each}, need {size_text(need)}, "
            f"{size_text(free)} are free"
        )
        if at_a_time == 1:
            fits = "fewer lanes (lanes.seed) or a smaller batch_size may fit"
            raise UserError(f"{too_many}; nor does one at a time: {fits}" if too_many else f"{needs}; {fits}")
        too_many = too_many or needs
        at_a_time = max(1, min(at_a_time // 2, at_a_time * (free - chunks) // (need - chunks)))
    if wanted and too_many:
        raise UserError(f"{too_many}; {at_a_time} at a time would fit: lanes.at_a_time={at_a_time}")
    return Programs(
        initial.result(),
        compiled["train"],
        compiled["test"],
        compiled["fit"],
        compiled.get("validation"),
        compiled.get("distance"),
        keep and keep.result(),
        spread,
        at_a_time,
        need,
        time.perf_counter() - start,
    )


def begin(recipe: Recipe) -> Callable[[LaneNumbers], tuple[State, train.Keys]]:
    """The function that makes a model's state and its keys, as words: they follow from its seed, and are kept in
    checkpoints to be compared."""
    initialize = train.initialize(recipe)
    return lambda numbers: (initialize(numbers), train.Keys(*map(jax.random.key_data, train.keys_of(numbers))))


def state_shapes(arm: TrainedArm, spread: Spread) -> tuple[State, train.Keys]:
    """Return the shapes and shardings of what a checkpoint of an arm keeps; compiles nothing."""
    numbers = spread.filled(numbers_of(arm))
    made: tuple[State, train.Keys]
    made = jax.eval_shape(train.over_lanes(begin(recipe_of(arm)), at_a_time=1), numbers)
    shape: Any = jax.ShapeDtypeStruct
    made = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype, sharding=spread.by_lane), made)
    return made


def has_freed_weights(model: Model) -> bool:
    """Whether a layer is a local or full reading of a convolution."""
    return any(isinstance(layer, Local | Full) for layer in walk(model.layers))


def evaluation_batch(arm: TrainedArm) -> int:
    """Examples that are evaluated together: 500, or as many as take `EVALUATION_BYTES` as float32, or a piece of
    `accumulate`."""
    one = arm.experiment
    fitting = EVALUATION_BYTES // (4 * math.prod(arm.input_shape))
    most = one.batch_size // one.accumulate if one.accumulate > 1 else 500
    return max(1, min(500, fitting, most))


def shapes(tree: Any) -> Any:
    """The shapes of arrays."""
    shape: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda array: shape(array.shape, array.dtype), tree)


def size_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of those that it has the shapes of."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def numbers_of(arm: TrainedArm) -> LaneNumbers:
    """The numbers of all lanes of an arm, an array each."""
    columns = zip(*arm.lanes, strict=True)
    seeds = ("seed", "order_seed")
    kinds = (np.uint32 if name in seeds else np.float32 for name in LaneNumbers._fields)
    return LaneNumbers(*(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))  # type: ignore[arg-type]


def spread_of(arm: TrainedArm, devices: Sequence[jax.Device], hosts: Hosts = ALONE) -> Spread:
    """The devices of an arm's lanes; raises UserError for a mesh that they cannot have."""
    one = arm.experiment
    asked = None if one.mesh is None else (one.mesh[0], one.mesh[1])
    # So that a batch can be cut into the pieces of `accumulate` on each of the devices that share it.
    return mesh.spread(len(arm.lanes), devices, one.batch_size // one.accumulate, asked, hosts)


def recipe_of(arm: TrainedArm, spread: Spread | None = None) -> Recipe:
    """What is static in training an arm's models. Arms of equal recipes, data and lanes share their programs."""
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
    """Inside, what JAX compiles is kept in the user's cache folder, one subfolder per kind of processor.

    A cache that the user gave JAX (`JAX_COMPILATION_CACHE_DIR`) or forbade it (`JAX_ENABLE_COMPILATION_CACHE`) stays.
    Where nothing can be written, or others could put their machine code, nothing is kept, and `says` is told. It is
    also told where what was kept is damaged, as a run that was killed may leave it, or one that is writing just now:
    programs of that name are thrown away.
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
        compilation_cache.reset_cache()  # JAX looks at the settings at its first compilation, which may be over
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
            with contextlib.suppress(OSError):  # another process was first
                path.unlink()
    if damaged:
        says(f"compiled programs in {folder} were damaged: they are thrown away")
