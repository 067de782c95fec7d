"""Compile a function for a chip that is not there, and read from the result what it would take.

libtpu compiles for TPUs and the CUDA plugin for NVIDIA's GPUs, on any machine: extras `aot` and `cuda12`. Nothing is
run. How far the estimates are from the published peaks: docs/accelerators.md.
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

from cnnlib.aot import hlo, schedule
from cnnlib.aot.hardware import Target, set_environment
from cnnlib.errors import UserError
from cnnlib.kernels import Kernels
from cnnlib.primitives import compiled_for

LAUNCH_SECONDS = 2e-6
"""Assumed for the start of a kernel on a GPU, as one of a stream or graph. Not measured here."""
GPU_DESCRIPTION = Path(__file__).with_name("h100.txtpb")
"""What XLA asks of a GPU, from xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla."""


@dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, all its runs together."""

    name: str
    kind: str
    source: str
    """The JAX operation that it comes from."""
    shape: str
    times: int
    seconds: float
    """Estimated, in all."""
    cycles: int | None
    """Scheduled on a TPU's core, or taken by its memory at the published bandwidth if that is longer; in all."""
    bytes: int
    """Read from and written to the main memory, in all."""


@dataclass(frozen=True)
class Report:
    """What a compiled program would take on one of the devices."""

    compile_seconds: float
    """Processor time of the compiler."""
    memory_bytes: int
    """Arguments, results and temporaries at the peak."""
    temporary_bytes: int
    operations: tuple[Operation, ...]
    """The most expensive first."""
    collectives: dict[str, int]
    """How often devices exchange data, by kind."""

    @property
    def seconds(self) -> float:
        """Estimated for one call."""
        return sum(operation.seconds for operation in self.operations)

    @property
    def cycles(self) -> int | None:
        """Scheduled for one call; None for GPUs."""
        counted = [operation.cycles for operation in self.operations if operation.cycles is not None]
        return sum(counted) if counted else None

    @property
    def bytes(self) -> int:
        """Moved by one call."""
        return sum(operation.bytes for operation in self.operations)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Make the folder into which libtpu writes the schedules of this process. It is removed with the process."""
    return tempfile.TemporaryDirectory(prefix="cnnlib-schedules-")


def schedules_folder() -> Path:
    """Return where libtpu writes schedules."""
    return Path(scratch().name)


@functools.cache
def devices(target: Target) -> tuple[Any, ...]:
    """Return the devices of hardware that is not there, to compile for.

    Raises UserError where the compiler for it is not installed, or does not know it.
    """
    try:
        if target.platform == "tpu":
            return _tpus(target)
        return _gpus(target)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{target}: the compiler does not serve: {reason}") from error


def _tpus(target: Target) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"{target} needs libtpu, cnnlib's extra `aot`: pip install -e '.[aot]'")
    set_environment()
    arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "xla_jf_dump_to" not in arguments:
        os.environ["LIBTPU_INIT_ARGS"] = f"{arguments} {schedule.flags(schedules_folder())}".strip()
    alone: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if target.devices == 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **alone)
    return tuple(found.devices)


def _gpus(target: Target) -> tuple[Any, ...]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(f"{target} needs the CUDA plugin, cnnlib's extra `cuda12`: pip install -e '.[cuda12]'")
    description = GPU_DESCRIPTION.read_text()
    found = topologies.get_topology_desc("gpu", platform="cuda", target_config=description, topology="1x1x1")
    return tuple(found.devices)


def on(device: Any, tree: Any) -> Any:
    """Return the shapes of arrays, placed on one device."""
    sharding = SingleDeviceSharding(device)
    shape: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda array: shape(array.shape, array.dtype, sharding=sharding), tree)


def compile_for(function: Any, arguments: tuple[Any, ...], target: Target, form: Kernels | None = None) -> Report:
    """Compile a jitted function for the target, and report what it takes.

    Args:
        function: from `jax.jit`.
        arguments: shapes; for one device placed with `on`, for several sharded as the function says.
        target: of the devices that arguments or shardings name (`devices`).
        form: of the operations (`primitives.form_in_use`); None for that of the target.
    """
    with compiled_for(form or ("tpu" if target.platform == "tpu" else "gpu")):
        lowered = function.lower(*arguments)
    if target.platform == "tpu":
        schedule.forget(schedules_folder())
    before = time.process_time()
    # Autotuning needs the GPU.
    options = {"xla_gpu_autotune_level": 0} if target.platform == "cuda" else None
    compiled = lowered.compile(options)
    seconds = time.process_time() - before
    return report_of(compiled, seconds, target)


def report_of(compiled: Any, seconds: float, target: Target) -> Report:
    """Report what a compiled program takes. For a TPU it must be the one that this process compiled last.

    Args:
        compiled: from `jax.stages.Lowered.compile`.
        seconds: of processor time that compiling took.
        target: with one of whose devices it runs.

    Raises UserError where libtpu has written no schedule.
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
    """Estimate an operation's runs; None for copies that run beside other work.

    An operation without a schedule, such as one on scalars, counts by the bytes that it moves.
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
