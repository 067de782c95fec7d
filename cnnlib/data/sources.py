"""Define sources, whose examples are read by position, and generate examples. A source need not fit in memory.

A `Source` is one split. Pickling a source is cheap, so it can be sent to processes that read ahead. The same positions
give the same examples in each process. Images stay uint8. Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np

from cnnlib.spec.window import Shape


class Split(NamedTuple):
    """Examples and their classes.

    Examples are uint8 or float32 arrays `(count, *spatial, channels)`. Classes are int32 arrays `(count,)`.
    """

    x: Any
    y: Any


class Source(Protocol):
    """The examples of one split, read by position."""

    @property
    def count(self) -> int:
        """Number of examples; positions are 0 to `count - 1`."""

    @property
    def input_shape(self) -> Shape:
        """Shape of one example."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the values of an example: uint8 or float32."""

    @property
    def is_in_memory(self) -> bool:
        """Whether reading only copies memory. If it does, worker processes would not make reading faster."""

    def read(self, indices: np.ndarray) -> Split:
        """Return the examples at `indices`, in the order of `indices`. Raise UserError if they cannot be read."""

    def labels(self) -> np.ndarray:
        """Return the classes of all examples as an int32 array `(count,)`, without decoding images."""


@dataclass(frozen=True)
class Arrays:
    """Examples in memory, or in a memory-mapped file."""

    x: np.ndarray
    y: np.ndarray
    is_in_memory = True

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.y)

    @property
    def input_shape(self) -> Shape:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the values of an example."""
        return self.x.dtype

    def read(self, indices: np.ndarray) -> Split:
        """Return copies of the examples at `indices`."""
        # `take` copies rows 1.5 times as fast as x[indices].
        x, y = np.take(self.x, indices, axis=0), np.take(self.y, indices)
        return Split(np.asarray(x), np.asarray(y, np.int32))  # plain arrays, also for a memory-mapped file

    def labels(self) -> np.ndarray:
        """Return all classes."""
        return np.asarray(self.y, np.int32)


@dataclass(frozen=True)
class Derived:
    """Base class of sources that wrap another source. It forwards everything except `read` to the wrapped source."""

    source: Source

    @property
    def count(self) -> int:
        """Number of examples."""
        return self.source.count

    @property
    def input_shape(self) -> Shape:
        """Shape of one example."""
        return self.source.input_shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the values of an example."""
        return self.source.dtype

    @property
    def is_in_memory(self) -> bool:
        """Whether the wrapped source is in memory."""
        return self.source.is_in_memory

    def labels(self) -> np.ndarray:
        """Return all classes."""
        return self.source.labels()


@dataclass(frozen=True)
class Subset(Derived):
    """A subset of a source: the examples at `indices`, in the order of `indices`."""

    indices: np.ndarray

    @property
    def count(self) -> int:
        """Number of examples in the subset."""
        return len(self.indices)

    def read(self, indices: np.ndarray) -> Split:
        """Return the examples at `indices`, which are positions in the subset."""
        return self.source.read(self.indices[indices])

    def labels(self) -> np.ndarray:
        """Return the classes of the subset."""
        return np.take(self.source.labels(), self.indices)


@dataclass(frozen=True)
class Shuffled(Derived):
    """A source whose pixels are permuted (see `shuffled`) when examples are read."""

    seed: int

    def read(self, indices: np.ndarray) -> Split:
        """Return the examples at `indices`, with permuted pixels."""
        x, y = self.source.read(indices)
        return Split(shuffled(x, self.seed), y)


def shuffled(x: np.ndarray, seed: int) -> np.ndarray:
    """Permute the pixels of `(count, *spatial, channels)` in the same way for all examples and channels."""
    places = np.random.RandomState(seed).permutation(int(np.prod(x.shape[1:-1])))
    return np.ascontiguousarray(x.reshape(len(x), len(places), x.shape[-1])[:, places].reshape(x.shape))


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Pick `count` examples with a fixed seed, and return their mask. Class shares are kept to within one example.

    Each class is shuffled. If a class has n members, its i-th member (i from 0) gets the rank (i + 1/2) / n. The
    `count` examples of lowest rank are picked. The shuffle uses RandomState because its results, unlike those of newer
    generators, are equal in all versions of NumPy.
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
    """Return `min(count, most)` evenly spaced positions in `0..count-1`."""
    few = min(count, most)
    return np.arange(few, dtype=np.int64) * count // max(few, 1)


@dataclass(frozen=True)
class Origin:
    """The origin of a data set: facts that are known without reading examples, and functions that read examples."""

    name: str
    input_shape: Shape
    num_classes: int
    counts: dict[str, int]
    """Numbers of train and test examples; empty if a TFDS set is not prepared yet."""
    read: Callable[[], tuple[Split, Split]]
    """Reads all training examples and all test examples."""
    class_names: tuple[str, ...] = ()
    dtype: np.dtype[np.generic] = field(default_factory=lambda: np.dtype(np.uint8))
    opened: Callable[[], tuple[Source, Source]] | None = None
    """Opens the training and test examples for reading by position. None: they can only be read as a whole."""

    def open(self) -> tuple[Source, Source]:
        """Return the sources of the training and test examples."""
        if self.opened is not None:
            return self.opened()
        train, test = self.read()
        return Arrays(*train), Arrays(*test)


# Generated examples.

LINE_CLASSES = ("vertical", "horizontal", "diagonal")


def make_lines(generator: np.random.RandomState, count: int, side: int = 28) -> Split:
    """Draw `count` images `(side, side, 1)` with one stroke each. The classes (`LINE_CLASSES`) come in random order.

    A stroke is 8 to 14 pixels long, one pixel wide and fully inside the image. Its brightness is 96 to 255. Noise with
    a standard deviation of 40 is added to all pixels. The sum is clipped to 0..255.
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
"""Noise value of each random byte: the medians of 256 equally likely slices of a Gaussian with std 40."""
NOISE_ALONE = np.clip(NOISE, 0, 255).astype(np.uint8)
"""Pixel values of noise without a stroke: `NOISE` clipped to 0..255."""
PLACING_WORDS = 4
"""Number of 64-bit random words that define a stroke. The words after them are the noise, one byte per pixel."""


@dataclass(frozen=True)
class SizedLines:
    """The task of `lines`, with `count` images of `side` x `side` pixels. An image is drawn when it is read.

    Example i depends only on the seed, the split and i. Its class is i modulo 3. A stroke is 2/7 to 1/2 of the side
    long and `side / 28` pixels wide (rounded, at least 1). For a diagonal, the width is measured along the rows of the
    image, so that all classes have equally many bright pixels. If the side is 28, strokes have the sizes of
    `make_lines`. Brightness and noise have the distributions of `make_lines`, but the noise has only 256 different
    values.
    """

    side: int
    count: int
    seed: int
    split: int
    """0: training, 1: test."""
    is_in_memory = False

    @property
    def input_shape(self) -> Shape:
        """Shape of one image."""
        return (self.side, self.side, 1)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of a pixel."""
        return np.dtype(np.uint8)

    def read(self, indices: np.ndarray) -> Split:
        """Draw the examples at `indices`."""
        indices = np.asarray(indices, np.int64)
        assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < self.count), "no such example"
        x = np.empty((len(indices), *self.input_shape), np.uint8)
        for image, index in zip(x[..., 0], indices.tolist(), strict=True):
            self._draw(image, index)
        return Split(x, (indices % len(LINE_CLASSES)).astype(np.int32))

    def labels(self) -> np.ndarray:
        """Return all classes, without drawing images."""
        return (np.arange(self.count) % len(LINE_CLASSES)).astype(np.int32)

    def _draw(self, image: np.ndarray, index: int) -> None:
        # The random bits of Philox are equal in all versions of NumPy. Each example has its own counter.
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
"""Standard deviation of the noise that is added to each value. For comparison, the signal has norm 1."""


def make_dsd(generator: np.random.RandomState, count: int, patches: int, signal: np.ndarray) -> Split:
    """Draw `count` float32 examples `(patches * len(signal), 1)` of noise.

    One patch of each example contains the signal: class 1 adds `signal` to it, and class 0 subtracts `signal` from it.
    """
    labels = generator.randint(2, size=count).astype(np.int32)
    x = generator.normal(0.0, DSD_NOISE, (count, patches, len(signal)))
    x[np.arange(count), generator.randint(patches, size=count)] += (2 * labels - 1)[:, None] * signal
    return Split(x.reshape(count, -1, 1).astype(np.float32), labels)
