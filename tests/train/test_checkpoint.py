"""Checkpoints: nothing changes on the way to the disk and back, and what has changed there is noticed."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlib.errors import UserError
from cnnlib.train.checkpoint import Checkpoints, Snapshot, Unreadable, checksums, sha256, snapshot


def tree_of_all_kinds(lanes=3):
    key = jax.random.key(0)
    return {
        "layer": {"kernel": jax.random.normal(key, (lanes, 5, 7)), "bias": jnp.full((lanes, 4), jnp.nan)},
        "diverged": jnp.arange(lanes) % 2 == 1,
        "epochs": jnp.arange(lanes, dtype=jnp.int32) - 1,
        "keys": jnp.full((lanes, 2), 2**32 - 1, jnp.uint32),
    }


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def like(tree):
    """The shapes of a tree with shardings, as of a device."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def saved(folder, tree, epoch=1, keep=1):
    kept = Checkpoints(folder, keep)
    kept.save(epoch, jax.jit(snapshot)(tree), {"epoch": epoch})
    kept.close()
    return folder


def read(folder, tree, epoch=1, lanes=3):
    with contextlib.closing(Checkpoints(folder)) as kept:
        assert kept.progress(epoch) == {"epoch": epoch}
        return kept.state(epoch, like(tree), lanes)


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    tree = tree_of_all_kinds()
    assert bits(read(saved(tmp_path, tree), tree)) == bits(tree)


def test_a_checkpoint_of_double_precision_gives_back_every_bit(tmp_path, float64):
    tree = {"a": jnp.linspace(0.0, 1.0, 6).reshape(2, 3), "n": jnp.arange(2)}
    assert tree["a"].dtype == jnp.float64
    assert bits(read(saved(tmp_path, tree), tree, lanes=2)) == bits(tree)


def test_lanes_that_fill_up_devices_may_be_more_or_fewer_than_when_it_was_written(tmp_path):
    written = tree_of_all_kinds(lanes=6)
    saved(tmp_path, written)
    for count in (4, 5, 9):
        found = read(tmp_path, tree_of_all_kinds(lanes=count), lanes=4)
        first = [jax.tree.map(lambda leaf: leaf[:4], tree) for tree in (found, written)]
        assert bits(first[0]) == bits(first[1])
        assert all(leaf.shape[0] == count for leaf in jax.tree.leaves(found))
    with pytest.raises(Unreadable, match="are not those of this arm"):
        read(tmp_path, tree_of_all_kinds(lanes=8), lanes=7)


def test_a_snapshot_outlives_the_arrays_that_it_was_taken_of():
    tree = tree_of_all_kinds()
    expected = bits(tree)
    taken = jax.jit(snapshot)(tree)
    jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(tree)
    assert bits(taken.state) == expected


def test_the_change_of_any_bit_changes_the_checksum_of_its_lane_alone():
    tree = {"a": jnp.arange(10, dtype=jnp.uint32).reshape(2, 5), "b": jnp.arange(2, dtype=jnp.uint32)}
    before = np.asarray(checksums(tree))
    for position in range(5):
        for bit in (0, 13, 31):
            changed = {**tree, "a": tree["a"].at[1, position].set(tree["a"][1, position] ^ np.uint32(1 << bit))}
            after = np.asarray(checksums(changed))
            assert after[0] == before[0] and after[1] != before[1]
    assert (np.asarray(checksums({**tree, "a": tree["a"][:, ::-1]})) != before).all()


def test_the_fingerprint_is_that_of_the_stated_bytes():
    kernel, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
    told = b"layer_0/bias float32 3\n" + bias.astype("<f4").tobytes()
    told += b"layer_0/kernel float32 2x3\n" + kernel.astype("<f4").tobytes()
    parameters = {"layer_0": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    assert sha256(parameters) == hashlib.sha256(told).hexdigest()
    turned = {"layer_0": {"kernel": kernel.T.copy().T, "bias": bias}}  # in another order in the memory
    assert sha256(turned) == sha256(parameters)
    assert sha256({"layer_0": {"kernel": -kernel, "bias": bias}}) != sha256(parameters)
    assert sha256({"layer_0": {"kernel": kernel.reshape(3, 2), "bias": bias}}) != sha256(parameters)


TREE = {"a": jnp.arange(20, dtype=jnp.float32).reshape(2, 10)}


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A folder after six checkpoints, two and the best one of which are to stay."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kept = Checkpoints(folder, keep=2)
    for epoch in range(1, 7):
        kept.best = min(epoch, 3)
        kept.save(epoch, snapshot({"a": TREE["a"] + epoch}), {"epoch": epoch})
    kept.close()
    return folder


def test_the_latest_stay_and_the_best(six):
    kept = Checkpoints(six)
    assert kept.epochs() == [3, 5, 6]
    kept.close()
    for epoch in (3, 5):
        assert np.array_equal(read(six, TREE, epoch, lanes=2)["a"], TREE["a"] + epoch)


def test_there_is_one_checkpoint_after_an_epoch(six):
    kept = Checkpoints(six)
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*(one after epoch 6|already exists)"):
        kept.save(6, snapshot(TREE), {})
    kept.close()


@pytest.mark.parametrize("other", [{"b": TREE["a"]}, {"a": TREE["a"][:, :9]}, {"a": TREE["a"].astype(jnp.int32)}, {}])
def test_arrays_that_are_not_expected_are_not_read(six, other):
    with pytest.raises(Unreadable, match="its arrays are not those of this arm"):
        read(six, {"c": TREE["a"][:, 0], **other}, 6, lanes=2)


def test_numbers_that_are_not_those_of_the_checksum_are_not_read(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(1, Snapshot(TREE, checksums(TREE).at[1].add(1)), {"epoch": 1})
    kept.close()
    with pytest.raises(Unreadable, match="its numbers are not those that were written"):
        read(tmp_path, TREE, lanes=2)
    assert bits(read(tmp_path, TREE, lanes=1)) == bits(TREE)  # the lane that is damaged is a copy


def test_what_could_not_be_written_is_said_by_whoever_waits(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*file"):
        kept.save(1, snapshot(TREE), {})


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut_off, Path.unlink, lambda path: path.write_bytes(b"\x80\x04.")])
def test_damage_to_any_file_of_a_checkpoint_is_noticed_or_harmless(damage, tmp_path):
    saved(tmp_path / "whole", TREE)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "1").rglob("*") if path.is_file()]
    noticed = 0
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        for path in files:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes((tmp_path / "whole" / path).read_bytes())
        damage(copy / file)
        try:
            assert bits(read(copy, TREE, lanes=2)) == bits(TREE)
        except Unreadable:
            noticed += 1
    assert noticed >= 3  # the numbers, their shapes, the progress
