"""The training loop of one arm: train all lanes (the models of the arm), epoch by epoch.

The loop writes no files, prints nothing and keeps no results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnlib.config.schema import LaneNumbers
from cnnlib.train.checkpoint import Snapshot
from cnnlib.train.feeds import ArmFeed
from cnnlib.train.programs import Programs
from cnnlib.train.types import Keys, State, Sums


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch. The arrays are on the host and have one entry per lane."""

    number: int
    train: Sums
    validation: Sums | None
    diverged: np.ndarray
    seconds: float
    """Training time, including the time that training waited for examples."""
    snapshot: Snapshot | None
    """A copy of the states after this epoch. The copy is on the devices. None if no checkpoint is due."""
    position: dict[str, int] | None
    """Position of the arm in its stream of examples; None if examples are not streamed."""
    waited: float
    """Upper bound on the seconds that training has waited for examples so far."""
    has_next_begun: bool
    """Whether the next epoch has begun. If so, `TrainingLoop.states` no longer holds the states of this epoch."""


class Begun(NamedTuple):
    """The results of an epoch, kept on the device. They stay valid when the next epoch overwrites the states."""

    train: Sums
    diverged: jax.Array
    validation: Sums | None
    snapshot: Snapshot | None
    seconds: float | None
    """Training time; None if training has not ended yet."""


class TrainingLoop:
    """Train all lanes of an arm. To train, iterate over the method `epochs`.

    If the examples are in device memory, the next epoch begins before the sums of the previous epoch are fetched.
    """

    def __init__(
        self,
        programs: Programs,
        feed: ArmFeed,
        numbers: LaneNumbers,
        states: State,
        keys: Keys,
        is_due: Callable[[int], bool],
        is_to_stop: Callable[[], bool],
        trace: Callable[[int], AbstractContextManager[bool]],
    ) -> None:
        """Take the states of all lanes.

        Args:
            programs: The compiled programs of the arm.
            feed: The source of the arm's examples.
            numbers: The hyperparameters of all lanes, on the devices.
            states: The states of all lanes, on the devices. Training overwrites them.
            keys: The random keys of all lanes. Snapshots contain them.
            is_due: Takes an epoch number; returns whether to take a snapshot after this epoch.
            is_to_stop: Called once per epoch. If it returns True, the loop yields an epoch's results before it begins
                the next epoch.
            trace: Takes an epoch number; returns a context manager for the training of this epoch. The context manager
                yields whether it traces the epoch.
        """
        self._programs, self._feed, self._numbers, self._keys = programs, feed, numbers, keys
        self._is_due, self._is_to_stop, self._trace = is_due, is_to_stop, trace
        self.states = states

    def epochs(self, done: int, last: int) -> Iterator[Epoch]:
        """Train from epoch `done + 1` to epoch `last`; yield the results of each epoch."""
        feed, fetched = self._feed, self._programs.spread.fetched
        jax.block_until_ready(self.states)  # type: ignore[no-untyped-call]
        idle_since = time.perf_counter()
        begun: Begun | None = None
        for number in range(done + 1, last + 1):
            ended, begun = begun or self._begin(number), None
            if number < last and not self._is_to_stop() and feed.runs_ahead:
                begun = self._begin(number + 1)
            train, diverged = fetched((ended.train, ended.diverged))
            seconds = time.perf_counter() - idle_since if ended.seconds is None else ended.seconds
            validation = fetched(ended.validation)
            idle_since = time.perf_counter()
            where = (feed.position, feed.waited)
            yield Epoch(number, train, validation, diverged, seconds, ended.snapshot, *where, begun is not None)

    def snapshot(self) -> Snapshot | None:
        """Return a copy of the states; None if the arm keeps no checkpoints."""
        if self._programs.snapshot is None:
            return None
        taken: Snapshot = self._programs.snapshot((self.states, self._keys))
        return taken

    def _begin(self, number: int) -> Begun:
        began, seconds = time.perf_counter(), None
        with self._trace(number) as is_traced:
            self.states, sums = self._feed.train(self.states, self._numbers)
            if is_traced:
                jax.block_until_ready(self.states)  # type: ignore[no-untyped-call]
        if not self._feed.runs_ahead:  # validation also reads chunks: stop the clock before validation
            jax.block_until_ready(self.states)  # type: ignore[no-untyped-call]
            seconds = time.perf_counter() - began
        validation = self._feed.validate(self.states)
        snapshot = self.snapshot() if self._is_due(number) else None
        return Begun(sums, jnp.copy(self.states.diverged), validation, snapshot, seconds)
