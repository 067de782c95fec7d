from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlib.config.schema import Augment
from cnnlib.errors import UserError
from cnnlib.train.augment import augmented, central, normalize, taken

X = jnp.asarray(np.random.RandomState(0).randint(1, 256, (200, 6, 5, 2)), jnp.uint8)


def draw(augment, x=X, seed=0):
    return np.asarray(augmented(jax.random.key(seed), x, augment))


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_batch_has_the_examples_bit_for_bit(images_last, dtype):
    index = np.asarray([3, 199, 0, 3, 77])
    stored = X if dtype == "uint8" else X.astype(jnp.float32) / 7
    batch = jax.jit(lambda x, index: taken(x, index, images_last))(stored, index)
    np.testing.assert_array_equal(batch, np.asarray(stored)[index])


def test_nothing_asked_nothing_done():
    np.testing.assert_array_equal(draw(Augment()), X)


def test_a_shift_moves_each_example_within_bounds_and_fills_with_zero():
    shifted = draw(Augment(shift=2))
    assert shifted.dtype == np.uint8
    padded = np.pad(X, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for example, image in zip(shifted, padded, strict=True):
        places = [(r, c) for r in range(5) for c in range(5) if np.array_equal(example, image[r : r + 6, c : c + 5])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 25  # with 200 examples each of the 25 shifts turns up


def test_a_crop_is_a_window_of_the_example_and_evaluation_takes_the_centre():
    augment = Augment(crop=3)
    crops = draw(augment)
    assert crops.shape == (200, 3, 3, 2) == (200, *augment.seen_shape((6, 5, 2)))
    for crop, image in zip(crops, np.asarray(X), strict=True):
        assert any(np.array_equal(crop, image[r : r + 3, c : c + 3]) for r in range(4) for c in range(3))
    np.testing.assert_array_equal(central(X, augment), X[:, 1:4, 1:4])
    np.testing.assert_array_equal(central(X, Augment()), X)


def test_a_flip_mirrors_about_half_of_the_examples():
    flipped = draw(Augment(flip=True))
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, X, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(flipped, X, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 70 <= sum(mirrored) <= 130


def test_signals_are_augmented_along_their_one_axis():
    signal = jnp.arange(40.0).reshape(1, 40, 1) + 1
    out = draw(Augment(crop=30, shift=3, flip=True), signal)
    assert out.shape == (1, 30, 1)


def test_other_keys_draw_other_changes():
    assert not np.array_equal(draw(Augment(shift=2)), draw(Augment(shift=2), seed=1))


def test_normalized_training_pixels_have_mean_zero_and_deviation_one():
    flat = np.asarray(X, np.float32).reshape(-1, 2)
    out = np.asarray(normalize(X, jnp.asarray(flat.mean(0)), jnp.asarray(flat.std(0))))
    np.testing.assert_allclose(out.reshape(-1, 2).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(out.reshape(-1, 2).std(0), 1, rtol=1e-5)


@pytest.mark.parametrize("augment", [Augment(crop=6), Augment(shift=5), Augment(crop=3, shift=3)])
def test_more_than_there_is_to_see_is_an_error(augment):
    with pytest.raises(UserError, match="augment"):
        augment.seen_shape((6, 5, 2))
