"""Compile a function for a chip that this machine does not have, and estimate its time and memory there.

On any machine, libtpu compiles for TPUs and the CUDA plugin for NVIDIA GPUs (extras `aot` and `cuda12`). The compiled
programs are not run. docs/accelerators.md compares the estimates with the published peaks. For a TPU, libtpu also
writes a schedule: the instructions that the chip starts in each cycle (`cnnlib/aot/schedule.py`).
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from cnnlib.aot import hlo, schedule
from cnnlib.aot.hardware import Target, set_environment
from cnnlib.errors import UserError
from cnnlib.ops.kernels import Kernels
from cnnlib.ops.primitives import compiled_for

LAUNCH_SECONDS = 2e-6
"""Assumed time to start a kernel on a GPU, in a stream or graph. Not measured here."""
GPU_DESCRIPTION = Path(__file__).with_name("h100.txtpb")
"""The properties of a GPU that XLA needs, from xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla."""


@dataclass(frozen=True)
class Operation:
    """One operation of a compiled program. `seconds`, `cycles` and `bytes` are totals over all its `times` runs."""

    name: str
    kind: str
    source: str
    """The JAX operation that this operation comes from."""
    shape: str
    times: int
    """Number of runs."""
    seconds: float
    cycles: int | None
    """Cycles of a TPU core, the larger of two numbers: the cycles in its schedule, and the cycles that it takes to move
    `bytes` at the published bandwidth. None for GPUs."""
    bytes: int
    """Bytes read from and written to main memory."""


@dataclass(frozen=True)
class Report:
    """Estimated time and memory of a compiled program, per device."""

    compile_seconds: float
    """CPU time of the compiler."""
    memory_bytes: int
    """Memory of arguments, results and temporaries together. A result that reuses an argument's memory adds nothing."""
    temporary_bytes: int
    operations: tuple[Operation, ...]
    """Sorted by estimated time, longest first."""
    collectives: dict[str, int]
    """Number of data exchanges between devices, by kind."""

    @property
    def seconds(self) -> float:
        """Estimated time of one call, in seconds."""
        return sum(operation.seconds for operation in self.operations)

    @property
    def cycles(self) -> int | None:
        """Estimated cycles of one call, or None for GPUs."""
        counted = [operation.cycles for operation in self.operations if operation.cycles is not None]
        return sum(counted) if counted else None

    @property
    def bytes(self) -> int:
        """Bytes of main memory that one call reads and writes."""
        return sum(operation.bytes for operation in self.operations)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Make the folder for the schedules that libtpu writes. The folder is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="cnnlib-schedules-")


def schedules_folder() -> Path:
    """Return the folder into which libtpu writes schedules."""
    return Path(scratch().name)


@functools.cache
def devices(target: Target) -> tuple[jax.Device, ...]:
    """Return the devices of a target to compile for. This machine need not have them.

    Raises UserError if the target's compiler is not installed or does not support the target.
    """
    try:
        if target.platform == "tpu":
            return _tpus(target)
        return _gpus(target)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{target}: the compiler does not serve: {reason}") from error


def _tpus(target: Target) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"{target} needs libtpu, cnnlib's extra `aot`: pip install -e '.[aot]'")
    set_environment()
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "xla_jf_dump_to" not in arguments:
        os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} {schedule.flags(schedules_folder())}".strip()
    alone: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if target.devices == 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **alone)
    return tuple(found.devices)


def _gpus(target: Target) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(f"{target} needs the CUDA plugin, cnnlib's extra `cuda12`: pip install -e '.[cuda12]'")
    description = GPU_DESCRIPTION.read_text()
    found = topologies.get_topology_desc("gpu", platform="cuda", target_config=description, topology="1x1x1")
    return tuple(found.devices)


def on(device: Any, tree: PyTree) -> Any:
    """Return the shapes and types of a tree of arrays, placed on one device."""
    sharding = SingleDeviceSharding(device)
    shape: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda array: shape(array.shape, array.dtype, sharding=sharding), tree)


def compile_for(function: Any, arguments: tuple[Any, ...], target: Target, form: Kernels | None = None) -> Report:
    """Compile a jitted function for the target, and estimate its time and memory.

    Args:
        function: A function from `jax.jit`.
        arguments: Shapes. For one device, place them with `on`; for several, shard them as `function` expects.
        target: Hardware to compile for. The shardings of `arguments` or `function` must use `devices(target)`.
        form: Lowering of the operations, such as `gpu` (`primitives.form_in_use`). None: the lowering for the target.
    """
    with compiled_for(form or ("tpu" if target.platform == "tpu" else "gpu")):
        lowered = function.lower(*arguments)
    if target.platform == "tpu":
        schedule.forget(schedules_folder())
    before = time.process_time()
    # Autotuning would need a real GPU, so it is switched off.
    options = {"xla_gpu_autotune_level": 0} if target.platform == "cuda" else None
    compiled = lowered.compile(options)
    seconds = time.process_time() - before
    return report_of(compiled, seconds, target)


def report_of(compiled: Any, seconds: float, target: Target) -> Report:
    """Estimate the time and memory of a compiled program.

    Args:
        compiled: A program from `jax.stages.Lowered.compile`. For a TPU, the program that this process compiled last.
        seconds: CPU time that compiling took.
        target: Hardware that the program was compiled for.

    Raises UserError if libtpu has written no schedule.
    """
    program = hlo.Program(compiled.as_text())
    issued = schedule.schedules(schedules_folder()) if target.platform == "tpu" else None
    if issued == {}:
        raise UserError(
            f"{target}: libtpu wrote no schedule, because JAX had loaded it before; "
            "set JAX_PLATFORMS=cpu before JAX starts"
        )
    memory = compiled.memory_analysis()
    operations: dict[tuple[str, str], Operation] = {}
    collectives: collections.Counter[str] = collections.Counter()
    for cost in program.costs():
        instruction = cost.instruction
        if instruction.opcode in hlo.COLLECTIVES:
            collectives[instruction.opcode] += cost.times
        operation = estimated(program, cost, target, issued)
        if operation is not None:
            operations[cost.computation.name, instruction.name] = operation
    return Report(
        seconds,
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        memory.temp_size_in_bytes,
        tuple(sorted(operations.values(), key=lambda operation: -operation.seconds)),
        dict(collectives),
    )


def estimated(program: hlo.Program, cost: hlo.Cost, target: Target, issued: dict[str, int] | None) -> Operation | None:
    """Estimate the cost of all runs of an operation. Return None for copies that run in parallel with other work.

    Some operations, such as those on scalars, have no schedule. Their time is the time to move their bytes.
    """
    instruction, chip = cost.instruction, target.chip
    if instruction.opcode in hlo.ASYNCHRONOUS:
        return None
    moved = hlo.moved_bytes(program, cost)
    by_memory = moved / chip.bandwidth
    cycles = None
    if issued is None:
        seconds = max(LAUNCH_SECONDS, by_memory)
    else:
        cycles = max(issued.get(instruction.name, 0), round(by_memory * chip.clock))
        seconds = cycles / chip.clock
    return Operation(
        instruction.name,
        instruction.kind,
        instruction.source,
        instruction.shape,
        cost.times,
        cost.times * seconds,
        None if cycles is None else cost.times * cycles,
        cost.times * moved,
    )
