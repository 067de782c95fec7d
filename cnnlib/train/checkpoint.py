"""Checkpoints of an arm during training, and fingerprints of trained models. Only this file imports Orbax.

A lane is one model of an arm. A checkpoint holds the state of all lanes as Orbax arrays. Each host writes the lanes of
its own devices in the background. Orbax does not detect a number that changed on disk, so a checkpoint also stores one
checksum per lane. Everything else, such as the epoch, is JSON. Reading a checkpoint never runs code from the file.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

from cnnlib.errors import UserError

STATE, PROGRESS = "state", "progress"
CHECKSUMS = "checksums"
BESIDE = 2**18
"""Upper bound on the bytes that a checkpoint takes in addition to its arrays."""


class Snapshot(NamedTuple):
    """A copy of the state of all lanes, which the next epoch does not overwrite."""

    state: PyTree
    checksums: UInt32[Array, " lane"]


def leaves(tree: PyTree) -> Iterator[tuple[str, PyTree]]:
    """Yield the path (such as `parameters/layer_0/kernel`) and the value of every array of a tree, in JAX's order."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys), leaf


def snapshot(tree: PyTree) -> Snapshot:
    """Copy a tree of arrays with a leading lane axis, and add its checksums. The caller compiles this function."""
    return Snapshot(jax.tree.map(jnp.copy, tree), checksums(tree))


def checksums(tree: PyTree) -> UInt32[Array, " lane"]:
    """Return one checksum per lane, modulo 2^32: 1 x (first 32-bit word) + 3 x (second word) + 5 x (third word) + ...

    All factors are odd, so a change of any single word changes the checksum.
    """
    total, first = jnp.zeros((), jnp.uint32), 0
    for _, leaf in leaves(tree):
        words = words_of(leaf.reshape(leaf.shape[0], -1))
        factors = 2 * (first + jnp.arange(words.shape[1], dtype=jnp.uint32)) + 1
        total = total + (words * factors[None]).sum(axis=1, dtype=jnp.uint32)
        first += words.shape[1]
    return total


def words_of(rows: Shaped[Array, "lane number"]) -> UInt32[Array, "lane word"]:
    """Return the bits of 4-byte or 8-byte numbers as 32-bit words; a bool becomes one word."""
    if rows.dtype == bool:
        return rows.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(rows, jnp.uint32).reshape(rows.shape[0], -1)


def sha256(*trees: PyTree) -> str:
    """Return the fingerprint of a model: of its parameters, and of its running statistics if it has any.

    The fingerprint is the SHA-256 of all arrays, sorted by path (`layer_0/bias` before `layer_0/kernel`). For each
    array, the SHA-256 first reads the UTF-8 line `PATH DTYPE SHAPE` and its newline. SHAPE looks like `5x5x1x6`. Then
    the SHA-256 reads the numbers of the array: little endian, with the last axis fastest.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(itertools.chain(*map(leaves, trees)), key=itemgetter(0)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype.name} {'x'.join(map(str, array.shape))}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


class Unreadable(Exception):
    """A checkpoint is incomplete or damaged, or belongs to another arm."""


class Checkpoints:
    """The checkpoints of one arm, each named by the number of epochs trained before it."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self._folder, self._keep = folder, keep
        self._began = 0.0
        self.best: int | None = None
        """Epoch of the best checkpoint, which is kept even if it is old; None: no checkpoint is the best."""
        self.seconds: float | None = None
        """Seconds that writing the last checkpoint took; None while that checkpoint is being written."""
        self.written_at = 0.0
        """`time.monotonic()` when the last checkpoint was complete."""

    @property
    def _orbax(self) -> Any:
        return _quiet_orbax()

    @functools.cached_property
    def _manager(self) -> Any:
        orbax = self._orbax
        self._folder.mkdir(parents=True, exist_ok=True)
        return orbax.CheckpointManager(
            self._folder.absolute(),
            options=orbax.CheckpointManagerOptions(
                create=False,
                preservation_policy=_LatestAndBest(self._keep, self),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                async_options=orbax.options.AsyncOptions(post_finalization_callback=self._is_written),
            ),
            item_handlers={
                STATE: orbax.PyTreeCheckpointHandler(use_compression=False),  # weights do not compress
                PROGRESS: orbax.JsonCheckpointHandler(),
            },
        )

    def _is_written(self) -> None:
        self.written_at = time.monotonic()
        self.seconds = self.written_at - self._began

    def epochs(self) -> list[int]:
        """Return the epochs that have a checkpoint, in order. Raise UserError if the folder cannot be read."""
        try:
            return sorted(self._manager.all_steps(read=True))
        except Exception as error:
            raise UserError(f"cannot read the checkpoints in {self._folder}: {_first_line(error)}") from error

    def save(self, epoch: int, taken: Snapshot, progress: Mapping[str, object]) -> None:
        """Wait until the previous checkpoint is written, then begin to write the checkpoint after `epoch`.

        An interrupted write leaves no checkpoint behind. Orbax deletes checkpoints that are too old to keep. Raise
        UserError if this write cannot begin, or if the previous write failed.
        """
        self._began, self.seconds = time.monotonic(), None
        try:
            self._check_space(taken)
            args = self._orbax.args
            items = {STATE: args.PyTreeSave(_flat(taken)), PROGRESS: args.JsonSave(progress)}
            is_begun = self._manager.save(epoch, args=args.Composite(**items), force=True)
        except Exception as error:
            raise UserError(f"cannot write a checkpoint to {self._folder}: {_first_line(error)}") from error
        if not is_begun:
            raise UserError(f"cannot write a checkpoint to {self._folder}: there is one after epoch {epoch}")

    def _check_space(self, taken: Snapshot) -> None:
        """Raise OSError if the disk is too full. Orbax would also report a full disk, but among tracebacks."""
        self._folder.mkdir(parents=True, exist_ok=True)
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(taken)) + BESIDE
        if (free := shutil.disk_usage(self._folder).free) < need:
            raise OSError(f"No space left on device, {need:,} bytes are needed and {free:,} are free")

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raise UserError if the write failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise UserError(f"cannot write a checkpoint to {self._folder}: {_first_line(error)}") from error

    def progress(self, epoch: int) -> dict[str, object]:
        """Return the JSON part of a checkpoint. Raise Unreadable if it cannot be read."""
        args = self._orbax.args
        try:
            found = self._manager.restore(epoch, args=args.Composite(**{PROGRESS: args.JsonRestore()}))[PROGRESS]
        except Exception as error:
            raise Unreadable(_first_line(error)) from error
        if not isinstance(found, dict):
            raise Unreadable(f"its {PROGRESS} is no object")
        return found

    def state(self, epoch: int, like: PyTree, lanes: int) -> PyTree:
        """Return the state of a checkpoint, on the devices of `like`.

        Args:
            epoch: The epoch of the checkpoint.
            like: Tree of shapes (`jax.ShapeDtypeStruct`) with shardings. The lane axis of `like` may be longer or
                shorter than in the checkpoint, because the number of padding lanes depends on the devices.
            lanes: Number of lanes that must exist with correct checksums. Later lanes may be filled with zeros.

        Raise Unreadable if the checkpoint is damaged, or if its arrays are not like those of `like`.
        """
        orbax = self._orbax
        wanted = _flat(Snapshot(like, jax.eval_shape(checksums, like)))
        shape: Any = jax.ShapeDtypeStruct
        by_lane = jax.tree.leaves(like)[0].sharding
        wanted[CHECKSUMS] = shape(wanted[CHECKSUMS].shape, jnp.uint32, sharding=by_lane)
        kinds = {name: (shape.shape[1:], np.dtype(shape.dtype).name) for name, shape in wanted.items()}
        try:
            # Check the shapes before reading the arrays: a damaged file may ask for any amount of memory.
            known = dict(self._manager.item_metadata(epoch)[STATE])
            found = {name: (tuple(entry.shape[1:]), np.dtype(entry.dtype).name) for name, entry in known.items()}
            if found != kinds or any(entry.shape[0] < lanes for entry in known.values()):
                raise Unreadable("its arrays are not those of this arm")
            how = {
                name: orbax.ArrayRestoreArgs(
                    sharding=shape.sharding, global_shape=shape.shape, dtype=shape.dtype, strict=False
                )
                for name, shape in wanted.items()
            }
            args = orbax.args.Composite(**{STATE: orbax.args.PyTreeRestore(wanted, restore_args=how)})
            arrays = self._manager.restore(epoch, args=args)[STATE]
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable(_first_line(error)) from error
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _flat(like)])
        is_right: Any = jax.jit(lambda state, stored: checksums(state)[:lanes] == stored[:lanes])(
            state, arrays[CHECKSUMS]
        )
        if not all(np.asarray(shard.data).all() for shard in is_right.addressable_shards):
            raise Unreadable("its numbers are not those that were written")
        return state

    def close(self) -> None:
        """Wait until the last checkpoint is written, then end Orbax's background work."""
        if "_manager" in vars(self):
            self.wait()
            self._manager.close()


class _LatestAndBest:
    """Preservation policy for Orbax: keep the newest checkpoints and the best one."""

    def __init__(self, latest: int, checkpoints: Checkpoints) -> None:
        self._latest, self._checkpoints = latest, checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self._latest :]
        return [c.step in newest or c.step == self._checkpoints.best for c in checkpoints]


@functools.cache
def _quiet_orbax() -> Any:
    """Import Orbax once, and silence its messages. The import takes as long as writing several checkpoints.

    Errors that matter are still raised. After a failed read or write, Orbax's other threads print tracebacks. These
    tracebacks add nothing, so they are silenced. Messages of other libraries still appear.
    """
    import orbax.checkpoint as orbax

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        is_of_a_callback = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that is freed before it has ended
        if not is_of_a_callback and (code is None or "orbax" not in code.co_filename):
            hook(unraisable)

    sys.unraisablehook = report
    return orbax


def _flat(tree: PyTree) -> dict[str, PyTree]:
    """Return the arrays of a tree, keyed by names that Orbax can store."""
    if isinstance(tree, Snapshot):
        return {**_flat(tree.state), CHECKSUMS: tree.checksums}
    return {path.replace("/", "."): leaf for path, leaf in leaves(tree)}


def _first_line(error: BaseException) -> str:
    text = " ".join((str(error).strip() or type(error).__name__).split())
    system = re.search(r"os_error_code='(\d+)'", text)  # tensorstore puts the error code after long paths
    return os.strerror(int(system[1])) if system else text[:300]
