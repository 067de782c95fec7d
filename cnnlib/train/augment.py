"""Turn stored examples into network inputs inside the compiled program: augment at random, then normalise."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from cnnlib.config.schema import Augment
from cnnlib.spec.window import Shape


def taken(x: Num[Array, "count ..."], index: Int[Array, " batch"], images_last: bool) -> Num[Array, "batch ..."]:
    """Return one batch: the stored examples at the positions in `index`.

    With `images_last`, multiply uint8 images by the identity matrix. In memory, the last axis of the product is the
    batch axis. A TPU's convolutions need this layout. On the TPU's matrix unit, the product takes a third of the cycles
    that a copy takes. Fully connected networks become faster too. bfloat16 holds uint8 values exactly, so the product
    equals the images.
    """
    batch = x[index]
    if not images_last or x.dtype != jnp.uint8:
        return batch
    identity = jnp.eye(index.shape[0], dtype=jnp.bfloat16)
    last = jnp.tensordot(batch.astype(jnp.bfloat16), identity, axes=(0, 0), preferred_element_type=jnp.float32)
    return jnp.moveaxis(last, -1, 0)


def normalize(
    x: Num[Array, "batch ..."], mean: Float[Array, " channel"], deviation: Float[Array, " channel"]
) -> Float[Array, "batch ..."]:
    """Return (`x` - `mean`) / `deviation` per channel, in float32. All three are in stored units (images: 0 to 255)."""
    shape = (1,) * (x.ndim - 1) + mean.shape
    return (x.astype(jnp.float32) - mean.reshape(shape)) / deviation.reshape(shape)


def central(x: Num[Array, "batch ..."], augment: Augment) -> Num[Array, "batch ..."]:
    """Return the central window, of size `augment.crop`, of each example. Return `x` if `augment.crop` is None."""
    if augment.crop is None:
        return x
    index = [slice(None), *(slice((n - augment.crop) // 2, (n + augment.crop) // 2) for n in x.shape[1:-1])]
    return x[tuple(index)]


class Draws(NamedTuple):
    """Random numbers for each example of a batch. A field is None if the augmentation does not use it."""

    crop: Int[Array, "batch axis"] | None
    shift: Int[Array, "batch axis"] | None
    flip: Bool[Array, " batch"] | None


def drawn(key: Key[Array, ""], batch: int, spatial: Shape, augment: Augment) -> Draws:
    """Return the random numbers for a whole batch, even if a device uses only part of them.

    `spatial` is the shape of an example without its channels.
    """
    key_crop, key_shift, key_flip = jax.random.split(key, 3)
    crop = shift = flip = None
    if augment.crop is not None:
        most = jnp.asarray([n - augment.crop + 1 for n in spatial])
        crop = jax.random.randint(key_crop, (batch, len(spatial)), 0, most[None, :])
    if augment.shift:
        shift = jax.random.randint(key_shift, (batch, len(spatial)), 0, 2 * augment.shift + 1)
    if augment.flip:
        flip = jax.random.bernoulli(key_flip, 0.5, (batch,))
    return Draws(crop, shift, flip)


def changed(x: Num[Array, "batch ..."], draws: Draws, augment: Augment) -> Num[Array, "batch ..."]:
    """Crop, shift and flip each example. The example's row of `draws` holds the random numbers for this."""
    spatial = x.shape[1:-1]
    if draws.crop is not None:
        x = _windows(x, draws.crop, (augment.crop or 0,) * len(spatial))
    if draws.shift is not None:
        pad = [(0, 0), *((augment.shift, augment.shift) for _ in spatial), (0, 0)]
        x = _windows(jnp.pad(x, pad), draws.shift, x.shape[1:-1])
    if draws.flip is not None:
        x = jnp.where(draws.flip.reshape((-1,) + (1,) * (x.ndim - 1)), jnp.flip(x, axis=-2), x)
    return x


def augmented(key: Key[Array, ""], x: Num[Array, "batch ..."], augment: Augment) -> Num[Array, "batch ..."]:
    """Crop, shift and flip each example of a batch at random."""
    return changed(x, drawn(key, x.shape[0], x.shape[1:-1], augment), augment)


def _windows(x: Array, starts: Array, size: Shape) -> Array:
    """Cut one window of shape `size` from each example. `starts` holds the first index of each example's window."""

    def window(example: Array, start: Array) -> Array:
        zero = jnp.zeros((1,), start.dtype)
        return jax.lax.dynamic_slice(example, jnp.concatenate([start, zero]), (*size, example.shape[-1]))

    return jax.vmap(window)(x, starts)
