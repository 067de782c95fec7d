"""Chunks of training examples, read ahead while training goes on, with grain; the only file that knows it.

A pass goes through all examples in one order for all models. A chunk is some batches of it, read in one call. It
depends on its number alone: the chunks are the same for any number of workers, and a stream that was stopped goes on at
any of them.

Workers are processes of this file, `python -m cnnlib.stream`, fed through pipes by grain's threads, and they end with
their pipes. Those that grain itself starts (0.2.18, seen again on 2026-11-28) stay for ever once this process is killed
by `kill -9`, 430 MB each since they import JAX; 58 chunks stayed in shared memory. They also need absl's flags to be
parsed and a guarded main program.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cnnlib.errors import UserError
from cnnlib.sources import Source, Split

CHUNK_BYTES = 64 * 2**20
"""Of a chunk; of more only where one batch has more."""
THREADS = 2
"""That read where there are no workers."""


class Chunk(NamedTuple):
    """Some batches of a pass, one after another, as stored."""

    x: np.ndarray
    """`(steps * batch_size, *spatial, channels)`."""
    y: np.ndarray
    """`(steps * batch_size,)`, int32."""
    pass_number: int
    """From the start of the training."""
    number: int
    """Of the chunk in its pass."""
    first_step: int
    """In its pass."""
    steps: int
    """Whole batches."""
    state: dict[str, int]
    """Where the stream is after it: JSON, from which an equal one goes on."""


@dataclass(frozen=True)
class Plan:
    """How passes are cut into chunks, and in which order they go through the examples."""

    count: int
    batch_size: int
    steps: int
    """The most that a chunk has."""
    seed: int
    reshuffle: bool

    @property
    def steps_a_pass(self) -> int:
        """Whole batches; what does not fill one is left out of the pass."""
        return self.count // self.batch_size

    @property
    def chunks_a_pass(self) -> int:
        """Chunks of a pass."""
        return -(-self.steps_a_pass // self.steps)

    def place(self, number: int) -> tuple[int, int, int, int]:
        """Pass, number in it, first step and steps of a chunk that is counted from the start of the training.

        All chunks of a pass have as many steps, to within one.
        """
        pass_number, chunk = divmod(number, self.chunks_a_pass)
        first, end = (k * self.steps_a_pass // self.chunks_a_pass for k in (chunk, chunk + 1))
        return pass_number, chunk, first, end - first

    def indices(self, number: int) -> np.ndarray:
        """Which examples it has, in order."""
        pass_number, _, first, steps = self.place(number)
        positions = np.arange(first * self.batch_size, (first + steps) * self.batch_size)
        return order(self.count, self.seed, pass_number)[positions] if self.reshuffle else positions

    def state(self, number: int) -> dict[str, int]:
        """Where the stream is before a chunk."""
        pass_number, chunk, _, _ = self.place(number)
        return {"pass": pass_number, "chunk": chunk, "chunks": self.chunks_a_pass}

    def number(self, state: dict[str, int] | None) -> int:
        """The chunk before which a stream was; raises UserError where its passes were cut otherwise."""
        if state is None:
            return 0
        if state["chunk"] and state["chunks"] != self.chunks_a_pass:
            raise UserError(
                f"a stream that stopped at chunk {state['chunk']} of {state['chunks']} in a pass cannot go on with "
                f"passes of {self.chunks_a_pass} chunks"
            )
        return state["pass"] * self.chunks_a_pass + state["chunk"]


def steps_a_chunk(source: Source, batch_size: int) -> int:
    """Batches of a chunk: as many as `CHUNK_BYTES` hold, at least one; a pass is cut evenly, so often fewer."""
    bytes_a_batch = batch_size * int(np.prod(source.input_shape)) * source.dtype.itemsize
    most = max(1, CHUNK_BYTES // bytes_a_batch)
    per_pass = source.count // batch_size
    chunks = max(1, -(-per_pass // most))
    return max(1, -(-per_pass // chunks))


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int, pass_number: int) -> np.ndarray:
    """Return the order of a pass: a permutation of `count` examples, `(position,)`, int64.

    NumPy makes that of a million in 20 ms. `grain.experimental.index_shuffle` needs 5 us per index, in Python.
    """
    found = np.random.Generator(np.random.Philox(key=pass_number << 64 | seed)).permutation(count)
    found.setflags(write=False)  # it is shared
    return found


def require_grain() -> None:
    """Raises UserError where what streams need is not installed."""
    try:
        import absl.logging  # noqa: F401  # sets the level below when it is first imported, so first

        logger = logging.getLogger("absl")
        level = logger.level
        logger.setLevel(logging.ERROR)  # grain warns of a JAX that cannot profile its processes, which we have none of
        try:
            import grain  # noqa: F401
        finally:
            logger.setLevel(level)
    except ImportError as error:
        raise UserError(f"streams need grain, cnnlib's extra `stream`: pip install -e '.[stream]' ({error})") from error


def chunks(
    source: Source,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    reshuffle: bool,
    workers: int | Workers,
    state: dict[str, int] | None = None,
) -> Generator[Chunk, None, None]:
    """Chunks of `steps` batches or one less, pass after pass without end, from `state` on; reads ahead.

    With `reshuffle` each pass has an order of its own, else that in which the examples are stored; those that do not
    fill a batch at its end are left out. `workers` are processes that read, and none are started for what is in memory
    already; with 0 threads of this process do. Closing it ends those that it has started. Raises UserError for what
    cannot be read.
    """
    plan = Plan(source.count, batch_size, steps, seed, reshuffle)
    if plan.steps_a_pass == 0:
        raise UserError(f"a batch of {batch_size} is more than there is to train on: {source.count}")

    def chunk(number: int, read: Callable[[np.ndarray], Split]) -> Chunk:
        x, y = read(plan.indices(number))
        return Chunk(x, y, *plan.place(number), plan.state(number + 1))

    return ahead(source, chunk, plan.number(state), None, workers)


def in_order(source: Source, size: int, workers: int | Workers = 0) -> Generator[Split, None, None]:
    """All examples as they are stored, `size` at a time, the last of them fewer; reads ahead as `chunks` does."""

    def part(number: int, read: Callable[[np.ndarray], Split]) -> Split:
        return read(np.arange(number * size, min((number + 1) * size, source.count)))

    return ahead(source, part, 0, -(-source.count // size), workers)


def ahead(
    source: Source,
    part: Callable[[int, Callable[[np.ndarray], Split]], Any],
    first: int,
    end: int | None,
    workers: int | Workers,
) -> Generator[Any, None, None]:
    """`part(number, read)` for all numbers from `first` to `end` (None: without end), in order, some of them ahead."""
    require_grain()
    import grain

    def parts() -> Generator[Any, None, None]:
        with contextlib.ExitStack() as stack:
            threads, read = THREADS, source.read
            if workers and not source.is_in_memory:
                started = stack.enter_context(Workers(workers)) if isinstance(workers, int) else workers
                threads, read = started.count, functools.partial(started.read, source)
            numbers = grain.MapDataset.range(sys.maxsize if end is None else end)
            iterator = iter(
                numbers.map(lambda number: part(int(number), read)).to_iter_dataset(
                    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
                )
            )
            stack.callback(iterator.close)
            iterator.set_state({"next_index": first})
            yield from iterator

    return parts()


class Workers:
    """Processes that read examples, as many at a time as there are, for any number of streams."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._all = [Worker() for _ in range(count)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._free.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.close()

    def read(self, source: Source, indices: np.ndarray) -> Split:
        """The examples at these positions, from whichever process has nothing to do."""
        worker = self._free.get()
        try:
            return worker.read(source, indices)
        finally:
            self._free.put(worker)


class Worker:
    """A process that reads examples; it ends when this one does, whatever ends it."""

    def __init__(self) -> None:
        self._known: list[Source] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cnnlib.stream"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # an interrupt from the keyboard is for this process
        )

    def read(self, source: Source, indices: np.ndarray) -> Split:
        """The examples at these positions; raises what reading them raised there."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and isinstance(stdout, io.BufferedReader)
        try:
            number = next((n for n, known in enumerate(self._known) if known is source), len(self._known))
            is_new = number == len(self._known)
            if is_new:  # told now, when the process has had time to start
                self._known.append(source)
            pickle.dump((number, source if is_new else None, indices), stdin)
            stdin.flush()
            head = pickle.load(stdout)
            if isinstance(head, Exception):
                raise head
            arrays = [np.empty(shape, dtype) for shape, dtype in head]
            for array in arrays:
                if array.size and stdout.readinto(array.data.cast("B")) != array.nbytes:
                    raise EOFError
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:  # cut off
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            raise UserError(
                f"a process that reads examples has died (exit status {self._process.returncode})"
            ) from error
        return Split(*arrays)

    def close(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what a dead process did not take
                if pipe is not None:
                    pipe.close()


def serve() -> None:
    """The other side of `Worker`: positions come through stdin, with a source that is new, and examples go out."""
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints does not get among the examples
    sources: list[Source] = []
    try:
        while True:
            number, new, indices = pickle.load(stdin)
            sources += [] if new is None else [new]
            try:
                split = sources[number].read(indices)
            except UserError as error:  # raised again on the other side
                pickle.dump(error, stdout)
            except Exception:  # not every one can be pickled
                pickle.dump(RuntimeError(traceback.format_exc()), stdout)
            else:
                arrays = [np.ascontiguousarray(array) for array in split]
                pickle.dump([(array.shape, array.dtype) for array in arrays], stdout)
                for array in arrays:
                    stdout.write(array.data.cast("B") if array.size else b"")
            stdout.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is there any more, so nothing is to be flushed


if __name__ == "__main__":
    serve()
