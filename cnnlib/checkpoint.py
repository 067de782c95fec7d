"""Checkpoints of an arm while it trains, and the fingerprint of what it has learned; the only file that knows Orbax.

A checkpoint holds the state of all lanes as one matrix of 32-bit words, a row a lane, and a part in JSON that says what
lies where in a row. One matrix, since Orbax takes as long for 30 small arrays as for 20 MB; by rows, since lanes are
what may be spread over devices. It is data: nothing that is read is ever run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from cnnlib.errors import UserError
from cnnlib.folder import writing

STATE, WORDS = "state", "words"
PROGRESS = "progress"


class Snapshot(NamedTuple):
    """The state of all lanes, apart from the arrays that the next epoch overwrites."""

    words: UInt32[Array, "lane word"]
    checksums: UInt32[Array, " lane"]
    """Of each row, since no format of Orbax notices a number that has changed on the disk."""


class Leaf(NamedTuple):
    """Where an array of one lane lies in its row."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    words: int


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every array of a tree with its path, such as `parameters/layer_0/kernel`, in JAX's order."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys), leaf


def layout(tree: Any) -> list[Leaf]:
    """Where each leaf of a tree of arrays (or of their shapes) with a leading lane axis lies in the rows."""
    found: list[Leaf] = []
    offset = 0
    for path, leaf in leaves(tree):
        dtype, shape = jnp.dtype(leaf.dtype), tuple(leaf.shape[1:])
        words = math.prod(shape) * max(1, dtype.itemsize // 4)
        found.append(Leaf(path, dtype.name, shape, offset, words))
        offset += words
    return found


def snapshot(tree: Any) -> Snapshot:
    """The rows of a tree of arrays with a leading lane axis, copied, with their checksums. To be compiled.

    Numbers of 4 or 8 bytes are cut into words, a truth value is one.
    """
    rows = [words_of(leaf.reshape(leaf.shape[0], -1)) for _, leaf in leaves(tree)]
    words = jnp.concatenate(rows, axis=1)
    return Snapshot(words, checksum(words))


def words_of(rows: Shaped[Array, "lane number"]) -> UInt32[Array, "lane word"]:
    """The bits of the numbers."""
    if rows.dtype == bool:
        return rows.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(rows, jnp.uint32).reshape(rows.shape[0], -1)


def checksum(words: UInt32[Array, "lane word"]) -> UInt32[Array, " lane"]:
    """The sum of a row's words times 1, 3, 5 ..., modulo 2^32: odd factors, so the change of a word always shows."""
    factors = 2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + 1
    return (words * factors[None]).sum(axis=1, dtype=jnp.uint32)


def checksums_of(words: np.ndarray) -> list[int]:
    """`checksum`, of rows on the host."""
    factors = 2 * np.arange(words.shape[1], dtype=np.uint32) + np.uint32(1)
    return [int((row * factors).sum(dtype=np.uint32)) for row in words]


def restored(words: np.ndarray, like: Any) -> Any:
    """The tree, shaped as `like` (arrays or their shapes, with a leading lane axis), that the rows were taken of."""
    arrays = []
    for leaf in layout(like):
        row = np.ascontiguousarray(words[:, leaf.offset : leaf.offset + leaf.words])
        numbers = row.astype(bool) if leaf.dtype == "bool" else row.view(leaf.dtype)
        arrays.append(numbers.reshape(len(words), *leaf.shape))
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def sha256(*trees: Any) -> str:
    """The fingerprint of a model: its parameters, and its running statistics where it has any.

    SHA-256 over all leaves in the alphabetical order of their paths (`layer_0/bias` before `layer_0/kernel`). Of each,
    a line in UTF-8, `PATH DTYPE SHAPE` with the shape as `5x5x1x6`, and its newline; then the numbers as they lie in
    memory, little endian, the last axis fastest.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(itertools.chain(*map(leaves, trees)), key=itemgetter(0)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {'x'.join(map(str, array.shape))}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


class Unreadable(Exception):
    """A checkpoint that is not whole, or not of this arm."""


class Checkpoints:
    """The checkpoints of one arm, by the number of epochs that they follow."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self._folder, self._keep = folder, keep
        self.best: int | None = None
        """The epoch whose checkpoint stays whatever its age."""

    @functools.cached_property
    def _orbax(self) -> Any:
        import orbax.checkpoint as orbax

        # What Orbax tells of its own doings is no news for the user; what it raises is.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        return orbax

    @functools.cached_property
    def _manager(self) -> Any:
        orbax = self._orbax
        # Of a run on several hosts process 0 reads and writes alone, and waits for nobody.
        alone = {"primary_host": 0, "active_processes": {0}}
        self._folder.mkdir(parents=True, exist_ok=True)
        return orbax.CheckpointManager(
            self._folder.absolute(),
            options=orbax.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=orbax.options.MultiprocessingOptions(**alone),
                preservation_policy=_LatestAndBest(self._keep, self),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                save_root_metadata=False,
            ),
            item_handlers={
                # Weights do not compress, and one file is what is cheapest to write.
                STATE: orbax.PyTreeCheckpointHandler(
                    use_ocdbt=False,
                    use_compression=False,
                    multiprocessing_options=orbax.options.MultiprocessingOptions(**alone),
                ),
                PROGRESS: orbax.JsonCheckpointHandler(),
            },
        )

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, as they grow; raises UserError for a folder that cannot be read."""
        try:
            return sorted(self._manager.all_steps(read=True))
        except Exception as error:
            raise UserError(f"cannot read the checkpoints in {self._folder}: {_first_line(error)}") from error

    def write(self, epoch: int, words: np.ndarray, progress: dict[str, Any]) -> None:
        """Writes a checkpoint, whole or not at all; older ones go when it is. Raises whatever Orbax does."""
        args = self._orbax.args
        items = {STATE: args.PyTreeSave({WORDS: words}), PROGRESS: args.JsonSave(progress)}
        if not self._manager.save(epoch, args=args.Composite(**items), force=True):
            raise FileExistsError(f"{self._folder} has one after epoch {epoch}")

    def progress(self, epoch: int) -> dict[str, Any]:
        """The JSON part of a checkpoint; raises Unreadable."""
        args = self._orbax.args
        try:
            found = self._manager.restore(epoch, args=args.Composite(**{PROGRESS: args.JsonRestore()}))[PROGRESS]
        except Exception as error:
            raise Unreadable(_first_line(error)) from error
        if not isinstance(found, dict):
            raise Unreadable(f"its {PROGRESS} is no object")
        return found

    def words(self, epoch: int, shape: tuple[int, int]) -> np.ndarray:
        """The rows of a checkpoint, which must be as many and as long; raises Unreadable."""
        args = self._orbax.args
        try:
            # Looked at before anything is read: a damaged file may ask for any amount of memory.
            known = dict(self._manager.item_metadata(epoch)[STATE])
            found = {name: (tuple(entry.shape), np.dtype(entry.dtype).name) for name, entry in known.items()}
            if found == {WORDS: (shape, "uint32")}:
                as_numpy = {WORDS: self._orbax.RestoreArgs(restore_type=np.ndarray)}
                wanted = args.Composite(**{STATE: args.PyTreeRestore(restore_args=as_numpy)})
                return np.asarray(self._manager.restore(epoch, args=wanted)[STATE][WORDS])
        except Exception as error:
            raise Unreadable(_first_line(error)) from error
        raise Unreadable(f"it holds {found}, expected {WORDS} {shape}")

    def close(self) -> None:
        """Ends what Orbax has begun in the background."""
        if "_manager" in vars(self):
            self._manager.close()


class _LatestAndBest:
    """Orbax's question, which checkpoints stay, answered with the newest and the best."""

    def __init__(self, latest: int, checkpoints: Checkpoints) -> None:
        self._latest, self._checkpoints = latest, checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self._latest :]
        return [c.step in newest or c.step == self._checkpoints.best for c in checkpoints]


def _first_line(error: BaseException) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).split())
    system = re.search(r"([^:]*) \[os_error_code='\d+'", text)  # what tensorstore says behind two long paths
    return system[1].strip() if system else text[:300]


def write_what_is_asked_for() -> None:
    """What `writer.Writer` starts: a checkpoint for each message, a line when it is written, until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the training process, which then closes the pipe
    parent = int(sys.argv[1])
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    opened: dict[str, Checkpoints] = {}
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        import orbax.checkpoint  # noqa: F401  # before it is needed

        while len(length := stdin.read(8)) == 8:
            told = json.loads(stdin.read(int.from_bytes(length, "little")))
            rows, columns = told["shape"]
            numbers = stdin.read(4 * rows * columns)
            if len(numbers) < 4 * rows * columns:
                return  # whoever trained is gone
            failure, began = None, time.process_time()
            try:
                if not opened:
                    stack.enter_context(writing(Path(told["run"])))
                # Whoever goes on with the run does not expect it any more. A dead run's folder is free only for one who
                # has seen this lock free, so between this line and the end of writing nobody begins.
                if os.getppid() != parent:
                    return
                folder = told["folder"]
                opened.setdefault(folder, Checkpoints(Path(folder), told["keep"])).best = told["best"]
                words = np.frombuffer(numbers, np.uint32).reshape(rows, columns)
                opened[folder].write(told["epoch"], words, told["progress"])
            except Exception as error:
                failure = f"{told['folder']}: {_first_line(error)}"
            answer = {"failure": failure, "seconds": time.process_time() - began}
            stdout.write(json.dumps(answer).encode() + b"\n")
            stdout.flush()


if __name__ == "__main__":
    write_what_is_asked_for()
    os._exit(0)  # without the time that JAX takes to be torn down
