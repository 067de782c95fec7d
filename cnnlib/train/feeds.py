"""Feed examples to training, either from the memory of the devices or as a stream.

Resident examples are on the devices from the start. Streamed examples are read while training runs.

A `Feed` is the data set of a run. Its method `to` returns an `ArmFeed`, which trains and tests the lanes (the models)
of an arm. Resident and streamed feeds have the same methods, so a caller uses both kinds in the same way.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cnnlib.config.resolve import TrainedArm
from cnnlib.data import stream
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, StreamedSet, load, open_splits, size_in_bytes
from cnnlib.data.sources import Source
from cnnlib.errors import UserError
from cnnlib.train import sharding
from cnnlib.train.programs import Programs, size_text
from cnnlib.train.sharding import Spread
from cnnlib.train.step import Place
from cnnlib.train.types import Answers, Examples, State, Sums

STREAM_SHARE = 0.25
"""A data set that needs more than this share of the free memory is streamed, unless `data.stream` is set."""
AHEAD = 2
"""Largest number of chunks on a device: the chunk that the device computes now, and the next chunk."""


class Tested(NamedTuple):
    """The answers of an arm's models to the test examples."""

    labels: np.ndarray
    """Shape `(example,)`."""
    answers: Answers
    """Arrays of shape `(lane, example)`, on the host."""


class Resident:
    """A data set in the memory of the devices."""

    is_streamed = False

    def __init__(self, data_set: DataSet, devices: Sequence[jax.Device]) -> None:
        self.splits = on_devices(data_set, devices)

    def examples(self, arm: TrainedArm, spread: Spread) -> dict[str, Examples]:
        """Return, for each split, the examples that the programs of an arm take."""
        shared: dict[str, Examples] = spread.shared(self.splits)
        return shared

    def to(self, arm: TrainedArm, programs: Programs, position: dict[str, int] | None, waited: float) -> ResidentFeed:
        """Return the feed that trains and tests an arm's models."""
        # `position` is set only if `--force` resumes a run that was streamed. A resident epoch needs no position.
        return ResidentFeed(programs, programs.spread.shared(self.splits))


class ResidentFeed:
    """A data set in the memory of the devices that train an arm's lanes."""

    runs_ahead = True
    """Whether an epoch can begin before the sums of the previous epoch are known."""
    position = None
    waited = 0.0

    def __init__(self, programs: Programs, splits: dict[str, Examples]) -> None:
        self._programs, self._splits = programs, splits

    def train(self, states: State, numbers: PyTree) -> tuple[State, Sums]:
        """Start one epoch of all lanes; return before the epoch ends."""
        trained: tuple[State, Sums] = self._programs.epoch(states, numbers, self._splits["train"])
        return trained

    def validate(self, states: State) -> Sums | None:
        """Return the validation sums of all lanes, on the devices; None if there are no validation examples."""
        if self._programs.validate is None:
            return None
        sums: Sums = self._programs.validate(states.parameters, states.statistics, self._splits["validation"])
        return sums

    def fit(self, states: State, numbers: PyTree) -> Sums:
        """Return the sums of all lanes on their training examples."""
        sums: Sums = self._programs.fit(states.parameters, states.statistics, numbers, self._splits["train"])
        return sums

    def test(self, states: State) -> Tested:
        """Return the labels and the answers of all lanes for every test example."""
        test = self._splits["test"]
        answers = self._programs.predict(states.parameters, states.statistics, test)
        return Tested(np.asarray(test.y), self._programs.spread.fetched(answers))

    def test_examples(self, indices: np.ndarray) -> np.ndarray:
        """Return the test examples at `indices`, as stored."""
        examples: np.ndarray = np.asarray(self._splits["test"].x)[indices]
        return examples

    def close(self) -> None:
        """Do nothing: a resident feed has no worker processes to end."""


class Streamed:
    """A data set that is read chunk by chunk while training runs."""

    is_streamed = True

    def __init__(self, data_set: StreamedSet) -> None:
        self.data_set = data_set

    def steps_a_chunk(self, arm: TrainedArm) -> int:
        """Return how many batches of the arm one chunk holds."""
        train = self.data_set.train
        return stream.steps_a_chunk(train, arm.experiment.batch_size)

    def examples(self, arm: TrainedArm, spread: Spread) -> dict[str, Examples]:
        """Return, for each split, the shapes that the programs of an arm take. All chunks have the same shapes."""
        train, known = self.data_set.train, self.data_set
        count = self.steps_a_chunk(arm) * arm.experiment.batch_size
        shape: Any = jax.ShapeDtypeStruct
        shapes = Examples(
            shape((count, *train.input_shape), train.dtype),
            shape((count,), np.int32),
            *(shape(array.shape, array.dtype) for array in (known.mean, known.deviation)),
        )
        parts = {"train": train, "validation": known.validation, "test": known.test}
        return {name: shapes for name, source in parts.items() if source.count}

    def to(self, arm: TrainedArm, programs: Programs, position: dict[str, int] | None, waited: float) -> StreamedFeed:
        """Return the feed that trains and tests an arm's models. A stream begins at `position`; None: at its start."""
        return StreamedFeed(self.data_set, arm, programs, self.steps_a_chunk(arm), position, waited)


class StreamedFeed:
    """The chunks of a streamed data set, in the order in which an arm trains on them."""

    runs_ahead = False

    def __init__(
        self,
        data_set: StreamedSet,
        arm: TrainedArm,
        programs: Programs,
        steps_a_chunk: int,
        position: dict[str, int] | None,
        waited: float,
    ) -> None:
        one = arm.experiment
        self._data_set, self._programs = data_set, programs
        self._capacity, self._passes = steps_a_chunk * one.batch_size, one.passes
        self._per_pass = data_set.train.count // one.batch_size
        with contextlib.ExitStack() as stack:
            # All splits share the same worker processes: starting them and importing their libraries takes seconds.
            self._workers: int | stream.Workers = 0
            if one.data.workers and not data_set.train.is_in_memory:
                self._workers = stack.enter_context(stream.Workers(one.data.workers))
            self._chunks = stream.chunks(
                data_set.train,
                batch_size=one.batch_size,
                steps=steps_a_chunk,
                seed=0,
                reshuffle=one.reshuffle,
                workers=self._workers,
                state=position,
            )
            stack.callback(self._chunks.close)
            self._to_end = stack.pop_all()
        self.position = position
        """Position in the stream after the last trained chunk, as JSON. A resumed run continues from this position."""
        self.waited = waited
        """Upper bound on the seconds for which the devices were idle while examples were read."""

    def train(self, states: State, numbers: PyTree) -> tuple[State, Sums]:
        """Train all lanes for one epoch. Return while the last chunks may still run."""
        total: Sums | None = None
        going: deque[Sums] = deque()
        ends_epoch = False
        while not ends_epoch:
            chunk = self._next(going)
            is_last_of_pass = chunk.first_step + chunk.steps == self._per_pass
            ends_epoch = is_last_of_pass and (chunk.pass_number + 1) % self._passes == 0
            first = chunk.pass_number * self._per_pass + chunk.first_step
            steps, number = np.int32(chunk.steps), np.int32(chunk.number)
            place = Place(np.int32(chunk.pass_number), number, np.int32(first), steps, np.bool_(ends_epoch))
            states, sums = self._programs.epoch(states, numbers, self._put(chunk.x, chunk.y), place)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            keep_going(going, sums)
            self.position = chunk.state
        assert total is not None
        return states, total

    def _next(self, going: deque[Sums]) -> stream.Chunk:
        """Return the next chunk. If the devices have run out of work, add the reading time of the chunk to `waited`."""
        since = time.perf_counter()
        chunk = next(self._chunks)
        latest: Any = going[-1].loss if going else None  # JAX's type for arrays has no `is_ready`
        if latest is None or latest.is_ready():
            self.waited += time.perf_counter() - since
        return chunk

    def validate(self, states: State) -> Sums | None:
        """Return the validation sums of all lanes, on the devices; None if there are no validation examples."""
        return None if self._programs.validate is None else self._sums(states, self._data_set.validation)

    def fit(self, states: State, numbers: PyTree) -> Sums:
        """Return the sums of all lanes on their training examples."""
        return self._sums(states, self._data_set.train)

    def test(self, states: State) -> Tested:
        """Return the labels and the answers of all lanes for every test example."""
        labels, found = [], []
        for y, examples in self._in_order(self._data_set.test):
            answers = self._programs.predict(states.parameters, states.statistics, examples)
            labels.append(y)
            found.append(Answers(*(part[:, : len(y)] for part in self._programs.spread.fetched(answers))))
        whole = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return Tested(np.concatenate(labels), Answers(*whole))  # type: ignore[arg-type]

    def test_examples(self, indices: np.ndarray) -> np.ndarray:
        """Return the test examples at `indices`, as stored."""
        return np.asarray(self._data_set.test.read(indices).x)

    def close(self) -> None:
        """Stop reading, and end the worker processes."""
        self._to_end.close()

    def _sums(self, states: State, source: Source) -> Sums:
        total: Sums | None = None
        going: deque[Sums] = deque()
        for y, examples in self._in_order(source):
            sums = self._programs.fit(states.parameters, states.statistics, examples, np.int32(len(y)))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            keep_going(going, sums)
        assert total is not None
        return total

    def _in_order(self, source: Source) -> Iterator[tuple[np.ndarray, Examples]]:
        """For each chunk, yield its labels (on the host) and the whole chunk (on the devices)."""
        with contextlib.closing(stream.in_order(source, self._capacity, self._workers)) as parts:
            for x, y in parts:
                yield y, self._put(x, y)

    def _put(self, x: np.ndarray, y: np.ndarray) -> Examples:
        """Put a chunk on the devices. If the chunk is too short, fill it up with copies of its last example."""
        if lacking := self._capacity - len(y):
            x, y = (np.concatenate([rows, np.repeat(rows[-1:], lacking, axis=0)]) for rows in (x, y))
        known = (self._data_set.mean, self._data_set.deviation)
        spread = self._programs.spread
        return Examples(*spread.shared(sharding.replicated((x, y, *known), spread.devices)))


def keep_going(going: deque[Sums], sums: Sums) -> None:
    """Add the `sums` of a new chunk to `going`, then block until at most `AHEAD` chunks still run."""
    going.append(sums)
    if len(going) > AHEAD:
        jax.block_until_ready(going.popleft())  # type: ignore[no-untyped-call]


def on_devices(data_set: DataSet, devices: Sequence[jax.Device]) -> dict[str, Examples]:
    """Put all examples of every non-empty split on each device. They keep their stored type (uint8 for images)."""
    splits = {"train": data_set.train, "validation": data_set.validation, "test": data_set.test}
    return {
        name: Examples(*sharding.replicated((split.x, split.y, data_set.mean, data_set.deviation), devices))
        for name, split in splits.items()
        if len(split.y)
    }


Feed = Resident | Streamed
ArmFeed = ResidentFeed | StreamedFeed


def read_or_open(
    data: Data, free: int, says: Callable[[str], None], streamed: Collection[str] | None = None
) -> DataSet | StreamedSet:
    """Load a data set into memory, or open it for streaming.

    The first of these that is set decides: `data.stream`, `streamed`, `free`. `streamed` has the names of the data sets
    that earlier sessions of this run streamed; it is None for a new run. `free` is the free memory in bytes. If the
    data set is streamed because of its size, tell the user through `says`.
    """
    is_streamed = data.stream
    if is_streamed is None and streamed is not None:
        is_streamed = data.name in streamed
    if is_streamed is None:
        size = size_in_bytes(data)
        is_streamed = size > STREAM_SHARE * free
        if is_streamed:
            says(
                f"{data.name} takes {size_text(size)}, more than {STREAM_SHARE:.0%} of the {size_text(free)} that are "
                "free: it is streamed (data.stream=false keeps it on the device)"
            )
    if not is_streamed:
        return load(data)
    stream.require_grain()
    return open_splits(data)


def read_or_open_all(
    sets: Iterable[Data], free: int, says: Callable[[str], None], streamed: Collection[str] | None = None
) -> dict[Data, DataSet | StreamedSet]:
    """Load or open each data set in turn. Each loaded data set reduces the `free` bytes for the next data sets."""
    found: dict[Data, DataSet | StreamedSet] = {}
    for data in dict.fromkeys(sets):
        found[data] = read_or_open(data, free, says, streamed)
        free -= 0 if is_streamed(found[data]) else size_in_bytes(data)
    return found


def is_streamed(data_set: DataSet | StreamedSet) -> bool:
    """Return whether the examples of `data_set` are read during training."""
    return isinstance(data_set, StreamedSet)


def check_streamable(arm: TrainedArm, data_set: DataSet | StreamedSet) -> None:
    """Raise UserError if the data set is streamed, but each lane of the arm would need its own chunks."""
    if isinstance(data_set, StreamedSet) and arm.experiment.data.train is not None:
        raise UserError(
            f"arm {arm.name}: data.train={arm.experiment.data.train} draws examples for each lane, and all lanes see "
            f"the same chunks of {data_set.description.name}, which is streamed; data.stream=false keeps it in memory"
        )


def feed_of(data_set: DataSet | StreamedSet, devices: Sequence[jax.Device]) -> Feed:
    """Return the feed of a data set."""
    return Resident(data_set, devices) if isinstance(data_set, DataSet) else Streamed(data_set)
