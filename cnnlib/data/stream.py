"""Use grain to read chunks of training examples before training needs them. Only this file imports grain.

A pass goes through all examples. Its order is the same for all models. A chunk is a few batches of a pass, which are
read in one call. For given settings, the content of a chunk depends only on its number. Therefore chunks are the same
for any number of workers, and a stopped stream can continue at any chunk.

Workers are processes that run this file: `python -m cnnlib.data.stream`. Grain's threads talk to the workers through
pipes. A worker ends when its pipes close. We do not use grain's own processes (0.2.18, checked again on 2026-11-28). If
this process is killed by SIGKILL, grain's processes never end. Each of them holds 430 MB, because it imports JAX. In a
test, 58 chunks also stayed in shared memory. Grain's processes also need parsed absl flags and a guarded main program.
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

from cnnlib.data.sources import Source, Split
from cnnlib.errors import UserError

CHUNK_BYTES = 64 * 2**20
"""Largest chunk in bytes, unless a single batch is larger."""
THREADS = 2
"""Reading threads if there are no workers."""


class Chunk(NamedTuple):
    """Consecutive batches of a pass. The values are those of the source, unchanged."""

    x: np.ndarray
    """`(steps * batch_size, *spatial, channels)`."""
    y: np.ndarray
    """`(steps * batch_size,)`, int32."""
    pass_number: int
    """Number of the pass, from 0 at the start of training."""
    number: int
    """Number of the chunk in its pass, from 0."""
    first_step: int
    """Number of the chunk's first step in the pass, from 0."""
    steps: int
    """Number of steps in the chunk; each step uses one whole batch."""
    state: dict[str, int]
    """Position of the stream after this chunk, ready for JSON. A stream with the same settings can continue from it."""


@dataclass(frozen=True)
class Plan:
    """How passes are cut into chunks, and the order of examples in each pass."""

    count: int
    batch_size: int
    steps: int
    """Largest number of steps per chunk."""
    seed: int
    reshuffle: bool

    @property
    def steps_a_pass(self) -> int:
        """Number of whole batches per pass. An incomplete last batch is dropped."""
        return self.count // self.batch_size

    @property
    def chunks_a_pass(self) -> int:
        """Number of chunks per pass."""
        return -(-self.steps_a_pass // self.steps)

    def place(self, number: int) -> tuple[int, int, int, int]:
        """Return four numbers of a chunk: its pass, its number in the pass, its first step, and how many steps it has.

        The argument `number` counts chunks from the start of training. The chunks of a pass have equally many steps, or
        some chunks have one step more than the others.
        """
        pass_number, chunk = divmod(number, self.chunks_a_pass)
        first, end = (k * self.steps_a_pass // self.chunks_a_pass for k in (chunk, chunk + 1))
        return pass_number, chunk, first, end - first

    def indices(self, number: int) -> np.ndarray:
        """Return the positions of a chunk's examples, in order."""
        pass_number, _, first, steps = self.place(number)
        positions = np.arange(first * self.batch_size, (first + steps) * self.batch_size)
        return order(self.count, self.seed, pass_number)[positions] if self.reshuffle else positions

    def state(self, number: int) -> dict[str, int]:
        """Return the position of the stream before a chunk."""
        pass_number, chunk, _, _ = self.place(number)
        return {"pass": pass_number, "chunk": chunk, "chunks": self.chunks_a_pass}

    def number(self, state: dict[str, int] | None) -> int:
        """Return the number of the chunk after `state`. Raise UserError if the passes of `state` had other chunks."""
        if state is None:
            return 0
        if state["chunk"] and state["chunks"] != self.chunks_a_pass:
            raise UserError(
                f"a stream that stopped at chunk {state['chunk']} of {state['chunks']} in a pass cannot go on with "
                f"passes of {self.chunks_a_pass} chunks"
            )
        return state["pass"] * self.chunks_a_pass + state["chunk"]


def steps_a_chunk(source: Source, batch_size: int) -> int:
    """Return the largest number of batches per chunk.

    A chunk has at most `CHUNK_BYTES` bytes, but at least one batch. The chunks of a pass have similar sizes.
    """
    bytes_a_batch = batch_size * int(np.prod(source.input_shape)) * source.dtype.itemsize
    most = max(1, CHUNK_BYTES // bytes_a_batch)
    per_pass = source.count // batch_size
    chunks = max(1, -(-per_pass // most))
    return max(1, -(-per_pass // chunks))


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int, pass_number: int) -> np.ndarray:
    """Return the order of examples in a pass: a permutation of `count` examples, as an int64 array `(position,)`.

    NumPy permutes a million examples in 20 ms. `grain.experimental.index_shuffle` needs 5 us per index, in Python.
    """
    found = np.random.Generator(np.random.Philox(key=pass_number << 64 | seed)).permutation(count)
    found.setflags(write=False)  # the cache shares it between callers
    return found


def require_grain() -> None:
    """Raise UserError if grain, which streams need, is not installed."""
    try:
        import absl.logging  # noqa: F401  # import it first: its first import sets the level

        logger = logging.getLogger("absl")
        level = logger.level
        logger.setLevel(logging.ERROR)  # grain warns that JAX cannot profile its processes; we start none
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
    """Yield chunks without end, pass after pass. Start after `state`, and read ahead.

    A chunk has `steps` batches or one batch less. If `reshuffle` is true, each pass has a new order. If not, examples
    come in stored order. Each pass drops an incomplete last batch. `workers` is a pool of reading processes, or the
    number of processes to start. If it is 0, or if the source is in memory, threads of this process read. Closing the
    generator ends the processes that it started. Raise UserError if examples cannot be read.
    """
    plan = Plan(source.count, batch_size, steps, seed, reshuffle)
    if plan.steps_a_pass == 0:
        raise UserError(f"a batch of {batch_size} is more than there is to train on: {source.count}")

    def chunk(number: int, read: Callable[[np.ndarray], Split]) -> Chunk:
        x, y = read(plan.indices(number))
        return Chunk(x, y, *plan.place(number), plan.state(number + 1))

    return ahead(source, chunk, plan.number(state), None, workers)


def in_order(source: Source, size: int, workers: int | Workers = 0) -> Generator[Split, None, None]:
    """Yield all examples in stored order, `size` at a time (fewer in the last part). Read ahead like `chunks`."""

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
    """Yield `part(number, read)` for each number from `first` to `end - 1` (None: no end). Compute them ahead."""
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
    """A pool of `count` processes that read examples for any number of streams."""

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
        """Return the examples at `indices`, read by the next free process."""
        worker = self._free.get()
        try:
            return worker.read(source, indices)
        finally:
            self._free.put(worker)


class Worker:
    """A process that reads examples. It ends when this process ends, for any reason."""

    def __init__(self) -> None:
        self._known: list[Source] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cnnlib.data.stream"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # so that Ctrl-C interrupts only the parent process
        )

    def read(self, source: Source, indices: np.ndarray) -> Split:
        """Return the examples at `indices`. Raise the exception that the process raises, or UserError if it dies."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and isinstance(stdout, io.BufferedReader)
        try:
            number = next((n for n, known in enumerate(self._known) if known is source), len(self._known))
            is_new = number == len(self._known)
            if is_new:  # sent at the first read, so that the process has had time to start
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
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:  # the pipe was cut off
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            raise UserError(
                f"a process that reads examples has died (exit status {self._process.returncode})"
            ) from error
        return Split(*arrays)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a dead process left data unread
                if pipe is not None:
                    pipe.close()


def serve() -> None:
    """Run a worker process. It reads positions and new sources from stdin, and writes examples to stdout."""
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps prints of libraries out of the examples
    sources: list[Source] = []
    try:
        while True:
            number, new, indices = pickle.load(stdin)
            sources += [] if new is None else [new]
            try:
                split = sources[number].read(indices)
            except UserError as error:  # `Worker.read` raises it again
                pickle.dump(error, stdout)
            except Exception:  # some exceptions cannot be pickled
                pickle.dump(RuntimeError(traceback.format_exc()), stdout)
            else:
                arrays = [np.ascontiguousarray(array) for array in split]
                pickle.dump([(array.shape, array.dtype) for array in arrays], stdout)
                for array in arrays:
                    stdout.write(array.data.cast("B") if array.size else b"")
            stdout.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent has gone, so there is nothing to flush


if __name__ == "__main__":
    serve()
