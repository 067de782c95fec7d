"""A mesh of devices, (lane, data): lanes are spread over the first axis, and nothing passes between them.

Along the second axis devices share each batch of the same lanes, and add up their gradients.

The cores of a CPU count as devices where JAX is told so before it starts (`use_cores`): a small model's step is as fast
on one core as on several, so several models beside one another are as many times faster (benchmarks/README.md).
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

from cnnlib.errors import UserError
from cnnlib.machine import cores_here
from cnnlib.multihost import ALONE, Hosts

LANE, DATA = "lane", "data"
ALIGNMENT = 64
"""Bytes. An array on the host that begins at a multiple is the CPU's array as well, for all of its devices."""


def use_cores(count: int | None = None) -> None:
    """Makes each core that this process may use, or `count` of them, a device of JAX's CPU backend.

    To be called before anything is computed: what JAX has begun with stays, as does a number in `XLA_FLAGS`.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has begun
            jax.config.update("jax_num_cpu_devices", count or cores_here())


def devices(most: int | None = None) -> tuple[jax.Device, ...]:
    """The devices of JAX's default platform, `most` of each host where that is a number.

    Raises UserError where there are fewer, or none of the platform that was asked for.
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
    """Those of each process, in the order of the processes."""
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(device.process_index, []).append(device)
    return [own for _, own in sorted(found.items())]


def evenly(devices: Sequence[jax.Device], count: int) -> tuple[jax.Device, ...]:
    """So many of the devices, from each host as many as from others, while it has them."""
    of_hosts = by_host(devices)
    places = sorted((place, host) for host, own in enumerate(of_hosts) for place in range(len(own)))
    taken = [sum(host == wanted for _, host in places[:count]) for wanted in range(len(of_hosts))]
    return tuple(device for own, number in zip(of_hosts, taken, strict=True) for device in own[:number])


class Spread(NamedTuple):
    """The devices of an arm's lanes: equally many lanes each, the last ones filled up with copies of the last lane."""

    lanes: int
    devices: tuple[jax.Device, ...]
    """Those of the first lanes first."""
    shards: int = 1
    """Devices that share the batches of the same lanes."""
    hosts: Hosts = ALONE
    """Whose devices they are, those of process 0 first."""

    @property
    def groups(self) -> int:
        """Into which the lanes are divided."""
        return len(self.devices) // self.shards

    @property
    def data_axis(self) -> str | None:
        """Of the mesh, where batches are shared."""
        return DATA if self.shards > 1 else None

    @property
    def lanes_a_device(self) -> int:
        """Copies included."""
        return math.ceil(self.lanes / self.groups)

    @property
    def own_device(self) -> jax.Device:
        """The first of this host."""
        return next(device for device in self.devices if device.process_index == self.hosts.process)

    @property
    def sharing(self) -> int:
        """How many of the devices share one memory."""
        own = [device for device in self.devices if device.process_index == self.hosts.process]
        return len(own) if self.devices[0].platform == "cpu" else 1

    @property
    def by_lane(self) -> Sharding:
        """Of arrays with a leading lane axis."""
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
        """`jax.jit` of a function that each device runs on its own lanes: the leading axis of the first arguments."""
        if len(self.devices) == 1:
            return jax.jit(function, **options)
        specs = (PartitionSpec(LANE),) * lane_arguments + (PartitionSpec(),) * shared_arguments
        # Our primitives have no rules for what varies over a mesh, and need none: they meet no other device's lanes.
        mapped = jax.shard_map(
            function, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(LANE), check_vma=False
        )
        shardings = tuple(NamedSharding(self._mesh, spec) for spec in specs)
        return jax.jit(mapped, in_shardings=shardings, **options)

    def filled(self, tree: Any) -> Any:
        """Arrays of the host with a leading lane axis, with the copies that fill the last device."""
        copies = self.lanes_a_device * self.groups - self.lanes
        if not copies:
            return tree
        return jax.tree.map(lambda rows: np.concatenate([rows, np.repeat(rows[-1:], copies, axis=0)]), tree)

    def put(self, tree: Any) -> Any:
        """Put arrays of the host with a leading lane axis on the devices."""
        if self.hosts.count == 1:
            return jax.device_put(self.filled(tree), self.by_lane)
        return jax.tree.map(
            lambda rows: jax.make_array_from_callback(rows.shape, self.by_lane, lambda own: rows[own]),
            self.filled(tree),
        )

    def fetched(self, tree: Any) -> Any:
        """Return arrays with a leading lane axis on every host, without copies."""
        arrays = jax.device_get(tree) if self.hosts.count == 1 else process_allgather(tree, tiled=True)
        return jax.tree.map(lambda rows: rows[: self.lanes], arrays)

    def own(self, tree: Any) -> list[Any]:
        """Return the trees of the lanes whose first device is one of this host's, lane by lane, without copies."""
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

    def shared(self, tree: Any) -> Any:
        """Arrays that `replicated` has put on these devices and more, as they are on these."""
        sharding = NamedSharding(self._mesh, PartitionSpec())

        def on_these(array: jax.Array) -> Any:
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
    """The mesh that was asked for, or lanes over as many devices as share the work, then batches over those left.

    With 5 lanes 3 of 4 devices, since two of them have one lane more than the others; with 3 lanes and 8 devices 2 for
    each lane. A batch is shared by as many devices as divide it; the cores of a CPU share none, since one lane keeps
    them busy, and adding up costs more than it gains (`python -m benchmarks mesh`). Raises UserError for a mesh that
    needs more devices, or lanes, than there are, and where a host is left without any.
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


def replicated(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Arrays of the host, whole on each of its devices; those of a CPU share one copy."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    if len(devices) == 1:
        return jax.device_put(tree)
    mesh = Mesh(np.array(own), (LANE,), axis_types=(AxisType.Auto,))
    return jax.device_put(jax.tree.map(aligned, tree), NamedSharding(mesh, PartitionSpec()))


def aligned(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it, that begins at a multiple of `ALIGNMENT`."""
    array = np.ascontiguousarray(array)
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy: np.ndarray = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
