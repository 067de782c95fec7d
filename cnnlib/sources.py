"""Examples that are read by their positions, and how the generated ones are made; nothing here needs them all at once.

A `Source` is one split, cheap to pickle for processes that read ahead: the same positions give the same examples in
each of them. Images stay uint8; nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np

from cnnlib.spec import Shape


class Split(NamedTuple):
    """Examples `(count, *spatial, channels)`, uint8 or float32, and their classes `(count,)`, int32."""

    x: Any
    y: Any


class Source(Protocol):
    """The examples of a split, by position."""

    @property
    def count(self) -> int:
        """Examples; positions are 0 to this."""

    @property
    def input_shape(self) -> Shape:
        """Of one example."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers of an example: uint8 or float32."""

    @property
    def is_in_memory(self) -> bool:
        """Whether reading is no more than copying: processes of their own would have nothing to do."""

    def read(self, indices: np.ndarray) -> Split:
        """The examples at these positions, in their order; raises UserError where they cannot be read."""

    def labels(self) -> np.ndarray:
        """All classes `(count,)`, int32, by position, decoding no image."""


@dataclass(frozen=True)
class Arrays:
    """Examples in memory, or in a file that is mapped to it."""

    x: np.ndarray
    y: np.ndarray
    is_in_memory = True

    @property
    def count(self) -> int:
        """Examples."""
        return len(self.y)

    @property
    def input_shape(self) -> Shape:
        """Of one example."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its numbers."""
        return self.x.dtype

    def read(self, indices: np.ndarray) -> Split:
        """Copies of the examples at these positions."""
        # `take` copies rows half as fast again as x[indices].
        x, y = np.take(self.x, indices, axis=0), np.take(self.y, indices)
        return Split(np.asarray(x), np.asarray(y, np.int32))  # of what is mapped from a file, too

    def labels(self) -> np.ndarray:
        """All classes."""
        return np.asarray(self.y, np.int32)


@dataclass(frozen=True)
class Derived:
    """What a source that is made of another one has from it."""

    source: Source

    @property
    def count(self) -> int:
        """Examples."""
        return self.source.count

    @property
    def input_shape(self) -> Shape:
        """Of one example."""
        return self.source.input_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its numbers."""
        return self.source.dtype

    @property
    def is_in_memory(self) -> bool:
        """As its source."""
        return self.source.is_in_memory

    def labels(self) -> np.ndarray:
        """All classes."""
        return self.source.labels()


@dataclass(frozen=True)
class Part(Derived):
    """Some of the examples of a source: its `indices`, in that order."""

    indices: np.ndarray

    @property
    def count(self) -> int:
        """Examples of the part."""
        return len(self.indices)

    def read(self, indices: np.ndarray) -> Split:
        """The examples at these positions of the part."""
        return self.source.read(self.indices[indices])

    def labels(self) -> np.ndarray:
        """The classes of the part."""
        return np.take(self.source.labels(), self.indices)


@dataclass(frozen=True)
class Shuffled(Derived):
    """The examples of a source with their places in another order: `shuffled`, as they are read."""

    seed: int

    def read(self, indices: np.ndarray) -> Split:
        """The examples at these positions, their places moved."""
        x, y = self.source.read(indices)
        return Split(shuffled(x, self.seed), y)


def shuffled(x: np.ndarray, seed: int) -> np.ndarray:
    """Examples `(count, *spatial, channels)` with their places in another order, the same for all and all channels."""
    places = np.random.RandomState(seed).permutation(int(np.prod(x.shape[1:-1])))
    return np.ascontiguousarray(x.reshape(len(x), len(places), x.shape[-1])[:, places].reshape(x.shape))


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """A mask that picks `count` examples, each class in its share (to within one), by a fixed draw.

    Each class is shuffled; its i-th of n members gets the rank (i + 1/2) / n, and the lowest ranks are picked.
    RandomState, since NumPy freezes its streams and not those of its newer generators.
    """
    shuffle = np.random.RandomState(0)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[shuffle.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    mask = np.zeros(len(labels), bool)
    mask[np.argsort(rank, kind="stable")[:count]] = True
    return mask


def spaced(count: int, most: int) -> np.ndarray:
    """Positions of no more than `most` of `count` examples, evenly spaced; all of them where there are no more."""
    few = min(count, most)
    return np.arange(few, dtype=np.int64) * count // max(few, 1)


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from: what is known of it without reading, and how it is read."""

    name: str
    input_shape: Shape
    num_classes: int
    counts: dict[str, int]
    """Examples of train and test; empty where a TFDS set is not prepared yet."""
    read: Callable[[], tuple[Split, Split]]
    """Train and test, whole."""
    class_names: tuple[str, ...] = ()
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    opened: Callable[[], tuple[Source, Source]] | None = None
    """Train and test by position, where that is possible without reading them whole."""

    def open(self) -> tuple[Source, Source]:
        """Train and test by position."""
        if self.opened is not None:
            return self.opened()
        train, test = self.read()
        return Arrays(*train), Arrays(*test)


# Generated examples.

LINE_CLASSES = ("vertical", "horizontal", "diagonal")


def make_lines(generator: np.random.RandomState, count: int, side: int = 28) -> Split:
    """`count` images `(side, side, 1)` of one stroke each, classes as in `LINE_CLASSES`, in random order.

    A stroke is 8 to 14 pixels long and one wide, wholly inside, 96 to 255 bright, on noise of deviation 40 that is
    added to all pixels and clipped to 0..255.
    """
    labels = generator.permutation(np.arange(count) % len(LINE_CLASSES)).astype(np.int32)
    images = generator.normal(0.0, 40.0, (count, side, side))
    for image, label in zip(images, labels, strict=True):
        length = generator.randint(8, 15)
        steps = np.arange(length)
        rows = np.zeros(length, int) if LINE_CLASSES[label] == "horizontal" else steps
        columns = np.zeros(length, int) if LINE_CLASSES[label] == "vertical" else steps
        if LINE_CLASSES[label] == "diagonal" and generator.randint(2):
            columns = columns[::-1]
        top = generator.randint(side - rows.max())
        left = generator.randint(side - columns.max())
        image[top + rows, left + columns] += generator.randint(96, 256)
    return Split(np.clip(images, 0, 255).astype(np.uint8)[..., None], labels)


NOISE = np.rint([40.0 * NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)]).astype(np.int16)
"""A random byte as noise of deviation 40: the middles of 256 slices of a normal distribution, of equal probability."""
NOISE_ALONE = np.clip(NOISE, 0, 255).astype(np.uint8)
"""As it looks where there is no stroke."""
PLACING_WORDS = 4
"""Random words of 64 bits that place a stroke; those after them are the noise, a byte a pixel."""


@dataclass(frozen=True)
class SizedLines:
    """The task of `lines` on images of `side` pixels each way, made when they are read: as many as one likes.

    Example i of a split comes from the seed, the split and i alone, and its class is i modulo 3. A stroke is between
    2/7 and 1/2 of the side long and `side / 28` pixels wide (rounded, at least 1; a diagonal is that wide along its
    rows), so that all classes have as many bright pixels; at 28 it is drawn as `make_lines` does. Brightness and noise
    are as there, the noise in 256 steps.
    """

    side: int
    count: int
    seed: int
    split: int
    """0 to train on, 1 for testing."""
    is_in_memory = False

    @property
    def input_shape(self) -> Shape:
        """Of one image."""
        return (self.side, self.side, 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a pixel."""
        return np.dtype(np.uint8)

    def read(self, indices: np.ndarray) -> Split:
        """Draws these examples."""
        indices = np.asarray(indices, np.int64)
        assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < self.count), "no such example"
        x = np.empty((len(indices), *self.input_shape), np.uint8)
        for image, index in zip(x[..., 0], indices.tolist(), strict=True):
            self._draw(image, index)
        return Split(x, (indices % len(LINE_CLASSES)).astype(np.int32))

    def labels(self) -> np.ndarray:
        """All classes, without drawing."""
        return (np.arange(self.count) % len(LINE_CLASSES)).astype(np.int32)

    def _draw(self, image: np.ndarray, index: int) -> None:
        # The bits of Philox are frozen, as those of every NumPy bit generator; each example has a counter of its own.
        stream = np.random.Philox(counter=index << 64, key=self.split << 64 | self.seed)
        words = stream.random_raw(PLACING_WORDS + -(-image.size // 8)).astype("<u8", copy=False)
        noise = words[PLACING_WORDS:].view(np.uint8)[: image.size].reshape(image.shape)
        np.take(NOISE_ALONE, noise, out=image, mode="clip")
        how_long, how_bright, how_low, how_far = (int(word) for word in words[:PLACING_WORDS])
        shortest = -(-2 * self.side // 7)
        length = shortest + how_long % (self.side // 2 - shortest + 1)
        along, across = np.arange(length)[:, None], np.arange(max(1, round(self.side / 28)))[None, :]
        rows, columns = along, across
        if LINE_CLASSES[index % 3] == "horizontal":
            rows, columns = across, along
        elif LINE_CLASSES[index % 3] == "diagonal":
            is_mirrored = how_bright >> 63
            columns = (length - 1 - along if is_mirrored else along) + across
        rows = rows + how_low % (self.side - int(rows.max()))
        columns = columns + how_far % (self.side - int(columns.max()))
        image[rows, columns] = np.clip(NOISE[noise[rows, columns]] + (96 + how_bright % 160), 0, 255)


DSD_NOISE = 0.3
"""Deviation of each number, where the signal has length 1."""


def make_dsd(generator: np.random.RandomState, count: int, patches: int, signal: np.ndarray) -> Split:
    """`count` signals `(patches * len(signal), 1)`, float32; class 1 has the signal in a patch, 0 minus it."""
    labels = generator.randint(2, size=count).astype(np.int32)
    x = generator.normal(0.0, DSD_NOISE, (count, patches, len(signal)))
    x[np.arange(count), generator.randint(patches, size=count)] += (2 * labels - 1)[:, None] * signal
    return Split(x.reshape(count, -1, 1).astype(np.float32), labels)
