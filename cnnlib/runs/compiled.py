"""The compiled programs of a run's arms."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import jax

from cnnlib.config.resolve import TrainedArm
from cnnlib.data.declaration import Data
from cnnlib.ops import kernels
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.resume import Left
from cnnlib.spec.layers import Conv, Local, MaxPool
from cnnlib.spec.model import walk
from cnnlib.train.feeds import Feed
from cnnlib.train.multihost import Hosts
from cnnlib.train.programs import Programs, compile_cache, compile_programs

if TYPE_CHECKING:
    pass

MOST_AHEAD = 24
"""Number of arms to compile before the run begins, so that an arm that does not fit fails before anything is written.
Hundreds of programs would not fit in memory together, so each later arm compiles when its turn comes."""


class Compiled:
    """The compiled programs of unfinished arms. Arms with equal programs share them."""

    def __init__(
        self,
        keep: bool,
        fed: dict[Data, Feed],
        devices: tuple[jax.Device, ...],
        hosts: Hosts,
        left: Left,
        watcher: Watcher,
    ) -> None:
        self._keep, self._fed, self._devices, self._hosts = keep, fed, devices, hosts
        self._left, self._watcher = left, watcher
        self._made: dict[Hashable, Programs] = {}
        self._told: set[str] = set()

    def compile(self, arms: Sequence[TrainedArm]) -> None:
        """Compile the programs that unfinished arms among `arms` need and that are not compiled yet."""
        with compile_cache(self._keep, self._watcher.says):
            for arm in arms:
                if arm.name not in self._left.finished and arm.name not in self._told:
                    self._told.add(arm.name)
                    self._watcher.arm_begins(arm.name, len(arm.lanes), arm.experiment.epochs)
                    self._compile(arm)

    def of(self, arm: TrainedArm) -> Programs:
        """Return the programs of an arm. Compile them if needed."""
        if self._key(arm) not in self._made or arm.name not in self._told:
            self.compile([arm])
        return self._made[self._key(arm)]

    def drop(self, arm: TrainedArm, coming: Sequence[TrainedArm]) -> None:
        """Free the programs of an arm, unless an arm in `coming` needs them."""
        key = self._key(arm)
        if all(self._key(other) != key for other in coming):
            self._made.pop(key, None)

    def _key(self, arm: TrainedArm) -> Hashable:
        return (arm.program, self._before(arm))

    def _before(self, arm: TrainedArm) -> int | None:
        """Return how many of the arm's lanes ran at a time in an earlier session; None: no such session."""
        found = self._left.in_flight.get(arm.name)
        return None if found is None else found.lanes_at_a_time

    def _compile(self, arm: TrainedArm) -> None:
        key, before = self._key(arm), self._before(arm)
        if key not in self._made:
            self._made[key] = compile_programs(arm, self._fed[arm.data], self._devices, before, self._hosts)
        now = self._made[key].at_a_time
        if before is not None and now != before:
            self._watcher.says(
                f"{arm.name}: {now} lanes at a time, {before} before: "
                "the results agree to rounding, not to the last bit"
            )


def kernels_for(arms: tuple[TrainedArm, ...], device: jax.Device, watcher: Watcher) -> str:
    """Choose kernels for convolution and pooling (`kernels.chosen`).

    Tell the user if the kernels must be compiled first, or if the kernels are slow.

    Raise UserError if `CNNLIB_KERNELS` is unknown or asks for kernels that cannot be compiled.
    """
    asked = kernels.asked()
    layers = [layer for arm in arms for layer in walk(arm.model.layers)]
    if device.platform != "cpu" or not any(isinstance(layer, (Conv, Local, MaxPool)) for layer in layers):
        return "xla"
    if asked in (None, "native") and not kernels.is_compiled():
        reason = kernels.not_kept()
        how_often = f"for this process only: {reason}" if reason else "once"
        watcher.says(f"compiling the convolutions for this processor, {how_often}")
    choice = kernels.chosen()
    if (asked, choice) == (None, "xla"):
        watcher.says(f"{kernels.register()}: convolutions run on XLA's own kernels, 2 to 4 times as long")
    return choice
