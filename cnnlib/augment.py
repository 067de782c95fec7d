"""Examples as a network sees them: uint8 to normalised floats, with random changes, inside the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from cnnlib.config import Augment
from cnnlib.spec import Shape


def normalize(
    x: Num[Array, "batch ..."], mean: Float[Array, " channel"], deviation: Float[Array, " channel"]
) -> Float[Array, "batch ..."]:
    """(x - mean) / deviation by channel, in float32, in the units of the stored examples (0 to 255 for images)."""
    shape = (1,) * (x.ndim - 1) + mean.shape
    return (x.astype(jnp.float32) - mean.reshape(shape)) / deviation.reshape(shape)


def central(x: Num[Array, "batch ..."], augment: Augment) -> Num[Array, "batch ..."]:
    """What evaluation sees: the central window of `augment.crop`, or everything."""
    if augment.crop is None:
        return x
    index = [slice(None), *(slice((n - augment.crop) // 2, (n + augment.crop) // 2) for n in x.shape[1:-1])]
    return x[tuple(index)]


def augmented(key: Key[Array, ""], x: Num[Array, "batch ..."], augment: Augment) -> Num[Array, "batch ..."]:
    """A batch with each example cropped, shifted and flipped at random; `key` draws for the whole batch."""
    key_crop, key_shift, key_flip = jax.random.split(key, 3)
    batch, spatial = x.shape[0], x.shape[1:-1]
    if augment.crop is not None:
        most = jnp.asarray([n - augment.crop + 1 for n in spatial])
        starts = jax.random.randint(key_crop, (batch, len(spatial)), 0, most[None, :])
        x = _windows(x, starts, (augment.crop,) * len(spatial))
    if augment.shift:
        pad = [(0, 0), *((augment.shift, augment.shift) for _ in spatial), (0, 0)]
        starts = jax.random.randint(key_shift, (batch, len(spatial)), 0, 2 * augment.shift + 1)
        x = _windows(jnp.pad(x, pad), starts, x.shape[1:-1])
    if augment.flip:
        flipped = jax.random.bernoulli(key_flip, 0.5, (batch,) + (1,) * (x.ndim - 1))
        x = jnp.where(flipped, jnp.flip(x, axis=-2), x)
    return x


def _windows(x: Array, starts: Array, size: Shape) -> Array:
    """From each example, the window of `size` that begins at its row of `starts`."""

    def window(example: Array, start: Array) -> Array:
        zero = jnp.zeros((1,), start.dtype)
        return jax.lax.dynamic_slice(example, jnp.concatenate([start, zero]), (*size, example.shape[-1]))

    return jax.vmap(window)(x, starts)
