"""Checkpoints: nothing changes on the way to the disk and back, and what has changed there is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlib.checkpoint import Checkpoints, Unreadable, checksums_of, layout, restored, sha256, snapshot


def tree_of_all_kinds(lanes=3):
    key = jax.random.key(0)
    return {
        "layer": {"kernel": jax.random.normal(key, (lanes, 5, 7)), "bias": jnp.full((lanes, 4), jnp.nan)},
        "diverged": jnp.arange(lanes) % 2 == 1,
        "epochs": jnp.arange(lanes, dtype=jnp.int32) - 1,
        "keys": jnp.full((lanes, 2), 2**32 - 1, jnp.uint32),
        "nothing": jnp.zeros((lanes, 0)),
    }


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_a_snapshot_gives_back_every_bit():
    tree = tree_of_all_kinds()
    taken = jax.jit(snapshot)(tree)
    assert taken.words.shape == (3, 1 + 1 + 2 + 4 + 35) and taken.words.dtype == jnp.uint32
    assert bits(restored(np.asarray(taken.words), tree)) == bits(tree)
    assert bits(restored(np.asarray(taken.words), jax.eval_shape(lambda: tree))) == bits(tree)
    assert checksums_of(np.asarray(taken.words)) == np.asarray(taken.checksums).tolist()


def test_a_snapshot_of_double_precision_gives_back_every_bit(float64):
    tree = {"a": jnp.linspace(0.0, 1.0, 6).reshape(2, 3), "n": jnp.arange(2)}
    assert tree["a"].dtype == jnp.float64
    assert bits(restored(np.asarray(snapshot(tree).words), tree)) == bits(tree)


def test_the_layout_says_where_an_array_lies():
    tree = tree_of_all_kinds()
    words = np.asarray(snapshot(tree).words)
    (leaf,) = (leaf for leaf in layout(tree) if leaf.path == "layer/kernel")
    row = words[1, leaf.offset : leaf.offset + leaf.words].view(np.float32).reshape(leaf.shape)
    assert leaf.dtype == "float32" and np.array_equal(row, tree["layer"]["kernel"][1])


def test_the_change_of_any_bit_changes_the_checksum():
    words = np.asarray(snapshot(tree_of_all_kinds()).words)[:1]
    before = checksums_of(words)
    for position in range(words.shape[1]):
        for bit in (0, 13, 31):
            changed = words.copy()
            changed[0, position] ^= np.uint32(1 << bit)
            assert checksums_of(changed) != before
    assert checksums_of(words[:, ::-1].copy()) != before


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


WORDS = np.arange(20, dtype=np.uint32).reshape(2, 10)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A folder after six checkpoints, two and the best one of which are to stay."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kept = Checkpoints(folder, keep=2)
    for epoch in range(1, 7):
        kept.best = min(epoch, 3)
        kept.write(epoch, WORDS + np.uint32(epoch), {"epoch": epoch})
    kept.close()
    return folder


def test_the_latest_stay_and_the_best(six):
    kept = Checkpoints(six)
    assert kept.epochs() == [3, 5, 6]
    assert kept.progress(5) == {"epoch": 5} and np.array_equal(kept.words(3, (2, 10)), WORDS + 3)
    kept.close()


def test_there_is_one_checkpoint_after_an_epoch(six):
    kept = Checkpoints(six)
    with pytest.raises(Exception, match=r"one after epoch 6|already exists"):
        kept.write(6, WORDS, {})
    kept.close()


def test_a_shape_that_is_not_expected_is_not_read(six):
    kept = Checkpoints(six)
    with pytest.raises(Unreadable, match="expected words"):
        kept.words(6, (2, 11))
    kept.close()


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut_off, Path.unlink, lambda path: path.write_bytes(b"\x80\x04.")])
def test_damage_to_any_file_of_a_checkpoint_is_noticed_or_harmless(damage, tmp_path):
    kept = Checkpoints(tmp_path / "whole")
    kept.write(1, WORDS, {"epoch": 1})
    kept.close()
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "1").rglob("*") if path.is_file()]
    noticed = 0
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        for path in files:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes((tmp_path / "whole" / path).read_bytes())
        damage(copy / file)
        kept = Checkpoints(copy)
        try:
            words, progress = kept.words(1, (2, 10)), kept.progress(1)
            # A lost chunk reads as zeros, which is what the checksum is for.
            noticed += checksums_of(words) != checksums_of(WORDS) or progress != {"epoch": 1}
        except Unreadable:
            noticed += 1
        kept.close()
    assert noticed >= 3  # the numbers, their shape, the progress
