"""Spread lanes over a mesh of devices with the axes (lane, data).

A lane is one model of an arm. Lanes are spread over the first axis, and never communicate. Devices along the second
axis train the same lanes: each device takes a part of every batch, and the gradients of the parts are added up.

`use_cores` makes each CPU core a device before JAX starts. A small model's step is as fast on one core as on several,
so N models on N cores train N times faster (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from cnnlib.errors import UserError
from cnnlib.system.machine import cores_here
from cnnlib.train.multihost import ALONE, Hosts

LANE, DATA = "lane", "data"
ALIGNMENT = 64
"""Bytes. If `ALIGNMENT` divides the address of a host array, all CPU devices share the array without a copy."""


def use_cores(count: int | None = None) -> None:
    """Make each CPU core a device of JAX's CPU backend.

    Use `count` cores; None: all cores that this process may use. Call this function before JAX computes anything; later
    it has no effect. A device count in `XLA_FLAGS` wins.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count or cores_here())


def devices(most: int | None = None) -> tuple[jax.Device, ...]:
    """Return the devices of JAX's default platform: `most` per host, or all if `most` is None.

    Raise UserError if a host has fewer than `most` devices, or if the requested platform has no device.
    """
    try:
        found = tuple(jax.devices())
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or "no such platform").splitlines()[0]
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}): {reason}"
        ) from error
    of_hosts = by_host(found)
    if most is not None and (fewest := min(of_hosts, key=len)) and most > len(fewest):
        where = "" if len(of_hosts) == 1 else f"process {fewest[0].process_index} of {len(of_hosts)}: "
        raise UserError(f"{where}devices={most}: JAX has {len(fewest)} ({found[0].platform})")
    return tuple(device for own in of_hosts for device in own[:most])


def by_host(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Return the devices of each process, in the order of the processes."""
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(device.process_index, []).append(device)
    return [own for _, own in sorted(found.items())]


def evenly(devices: Sequence[jax.Device], count: int) -> tuple[jax.Device, ...]:
    """Pick `count` devices, balanced over hosts."""
    of_hosts = by_host(devices)
    places = sorted((place, host) for host, own in enumerate(of_hosts) for place in range(len(own)))
    taken = [sum(host == wanted for _, host in places[:count]) for wanted in range(len(of_hosts))]
    return tuple(device for own, number in zip(of_hosts, taken, strict=True) for device in own[:number])


class Spread(NamedTuple):
    """How an arm's lanes are spread over devices.

    Each device has equally many lanes. If there are too few lanes, copies of the last lane (padding) are added.
    """

    lanes: int
    devices: tuple[jax.Device, ...]
    """The devices, in the order of the lanes that they train."""
    shards: int = 1
    """Number of devices that share the batches of the same lanes."""
    hosts: Hosts = ALONE
    """The processes that own the devices. The devices of process 0 come first."""

    @property
    def groups(self) -> int:
        """Number of groups of devices. The devices of a group train the same lanes."""
        return len(self.devices) // self.shards

    @property
    def data_axis(self) -> str | None:
        """Mesh axis along which devices share batches; None if no devices share batches."""
        return DATA if self.shards > 1 else None

    @property
    def lanes_a_device(self) -> int:
        """Number of lanes per device, padding included."""
        return math.ceil(self.lanes / self.groups)

    @property
    def own_device(self) -> jax.Device:
        """The first device of this host."""
        return next(device for device in self.devices if device.process_index == self.hosts.process)

    @property
    def sharing(self) -> int:
        """Number of this host's devices that share one memory."""
        own = [device for device in self.devices if device.process_index == self.hosts.process]
        return len(own) if self.devices[0].platform == "cpu" else 1

    @property
    def by_lane(self) -> Sharding:
        """Sharding of arrays with a leading lane axis."""
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._mesh, PartitionSpec(LANE))

    @property
    def _mesh(self) -> Mesh:
        grid = np.array(self.devices).reshape(self.groups, self.shards)
        return Mesh(grid, (LANE, DATA), axis_types=(AxisType.Auto,) * 2)

    def compiled_for(
        self, function: Callable[..., Any], lane_arguments: int = 1, shared_arguments: int = 0, **options: Any
    ) -> Any:
        """Return `jax.jit` of `function`. Each device runs it on its own lanes (first axis of lane arguments)."""
        if len(self.devices) == 1:
            return jax.jit(function, **options)
        specs = (PartitionSpec(LANE),) * lane_arguments + (PartitionSpec(),) * shared_arguments
        # check_vma=False: our primitives have no rules for this check. They need none, because they never use the lanes
        # of other devices.
        mapped = jax.shard_map(
            function, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(LANE), check_vma=False
        )
        shardings = tuple(NamedSharding(self._mesh, spec) for spec in specs)
        return jax.jit(mapped, in_shardings=shardings, **options)

    def filled(self, tree: PyTree) -> PyTree:
        """Append padding lanes to host arrays with a leading lane axis, so that all devices have equally many lanes."""
        copies = self.lanes_a_device * self.groups - self.lanes
        if not copies:
            return tree
        return jax.tree.map(lambda rows: np.concatenate([rows, np.repeat(rows[-1:], copies, axis=0)]), tree)

    def put(self, tree: PyTree) -> PyTree:
        """Put host arrays with a leading lane axis on the devices."""
        if self.hosts.count == 1:
            return jax.device_put(self.filled(tree), self.by_lane)
        return jax.tree.map(
            lambda rows: jax.make_array_from_callback(rows.shape, self.by_lane, lambda own: rows[own]),
            self.filled(tree),
        )

    def fetched(self, tree: PyTree) -> PyTree:
        """Fetch arrays with a leading lane axis to every host, without padding lanes."""
        arrays = jax.device_get(tree) if self.hosts.count == 1 else process_allgather(tree, tiled=True)
        return jax.tree.map(lambda rows: rows[: self.lanes], arrays)

    def own(self, tree: PyTree) -> list[PyTree]:
        """Return one tree per lane of this host, without padding. A lane belongs to the host of its first device."""
        of_hosts = [device.process_index for device in self.devices[:: self.shards]]
        if self.hosts.process not in of_hosts:
            return []
        first = of_hosts.index(self.hosts.process) * self.lanes_a_device
        count = min(of_hosts.count(self.hosts.process) * self.lanes_a_device, self.lanes - first)
        own = jax.tree.map(self._own_rows, tree)
        return [jax.tree.map(itemgetter(lane), own) for lane in range(count)]

    def _own_rows(self, array: jax.Array) -> np.ndarray:
        by_device = {shard.device: shard.data for shard in array.addressable_shards}
        own = [np.asarray(by_device[device]) for device in self.devices[:: self.shards] if device in by_device]
        return np.concatenate(own)

    def shared(self, tree: PyTree) -> PyTree:
        """Restrict replicated arrays to the devices of this spread. `replicated` may have put them on more devices."""
        sharding = NamedSharding(self._mesh, PartitionSpec())

        def on_these(array: jax.Array) -> PyTree:
            by_device = {shard.device: shard.data for shard in array.addressable_shards}
            parts = [by_device[device] for device in self.devices if device in by_device]
            if len(self.devices) == 1:
                return parts[0]
            return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

        return jax.tree.map(on_these, tree)


def spread(
    lanes: int,
    devices: Sequence[jax.Device],
    batch_size: int,
    mesh: tuple[int, int] | None = None,
    hosts: Hosts = ALONE,
) -> Spread:
    """Return how to spread lanes over devices.

    `mesh` gives the number of groups of devices and the number of devices per group. The devices of a group share
    batches. If `mesh` is None, use as many devices as are useful: spread the lanes first. Then use the remaining
    devices to share batches. 5 lanes use 3 of 4 devices, because one device has 2 lanes in any case. 3 lanes on 8
    devices use 2 devices per lane. The number of devices that share a batch divides `batch_size`. The cores of a CPU
    never share a batch: a lane keeps the cores busy, and adding gradients costs more than it gains (`python -m
    benchmarks mesh`). Raise UserError if the mesh needs more devices or lanes than there are, or if the mesh leaves a
    host without work.
    """
    if mesh is None:
        a_device = math.ceil(lanes / min(lanes, len(devices)))
        groups = math.ceil(lanes / a_device)
        left = 1 if devices[0].platform == "cpu" else len(devices) // groups
        shards = max(number for number in range(1, left + 1) if batch_size % number == 0)
    else:
        groups, shards = mesh
        if groups * shards > len(devices):
            raise UserError(
                f"mesh={groups},{shards} needs {groups * shards} devices: "
                f"JAX has {len(devices)} ({devices[0].platform})"
            )
        if math.ceil(lanes / math.ceil(lanes / groups)) != groups:
            raise UserError(
                f"mesh={groups},{shards}: {lanes} lanes leave some of {groups} groups of devices without any"
            )
    if hosts.count == 1:
        return Spread(lanes, tuple(devices[: groups * shards]), shards)
    used = evenly(devices, groups * shards)
    if idle := set(range(hosts.count)) - {device.process_index for device in used}:
        raise UserError(
            f"a mesh of {groups},{shards} leaves nothing to do for process {', '.join(map(str, sorted(idle)))} of "
            f"{hosts.count}: {lanes} lanes need fewer hosts, or mesh=LANES,SHARDS to share batches"
        )
    return Spread(lanes, used, shards, hosts)


def replicated(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Put a full copy of host arrays on each device of this host. CPU devices share one copy."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    if len(devices) == 1:
        return jax.device_put(tree)
    mesh = Mesh(np.array(own), (LANE,), axis_types=(AxisType.Auto,))
    return jax.device_put(jax.tree.map(aligned, tree), NamedSharding(mesh, PartitionSpec()))


def aligned(array: np.ndarray) -> np.ndarray:
    """Return the array if its address is a multiple of `ALIGNMENT`, else a copy at such an address."""
    array = np.ascontiguousarray(array)
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy: np.ndarray = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
