"""Find data sets of TensorFlow Datasets (TFDS) by name, prepare them, and read them whole or by position.

TFDS is imported at its first use. Reading a prepared set needs no TensorFlow. A prepared set may come from an untrusted
author, so no code that it names is run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnlib.data.declaration import Data
from cnnlib.data.sources import Origin, Split
from cnnlib.errors import UserError
from cnnlib.spec.window import Shape
from cnnlib.system.cache import cache_folder, keep_array, kept_array

if TYPE_CHECKING:  # the import takes seconds
    from tensorflow_datasets.core import DatasetBuilder, DatasetInfo
    from tensorflow_datasets.core.splits import SplitDict

PREPARED_WITH_TENSORFLOW = (
    "tensorflow_datasets.image_classification.mnist",
    "tensorflow_datasets.image_classification.cifar",
)
"""Builders that fail without TensorFlow, but only after the download. cnnlib raises the error before the download."""
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF")
"""Pillow's names of the image formats of TFDS. For other formats, such as EPS, Pillow may start a program."""


@functools.cache
def import_tfds() -> Any:
    """Import TFDS, and prevent it from importing modules that a data set names.

    `features.json` and `dataset_info.json` name the classes of the features. TFDS imports the module of each class that
    it does not know. Such a module could be any code of the files' author.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    class_of = connector.cls_from_name

    def known_class_of(name: str) -> Any:
        if name not in connector._registered_features:
            raise UserError(f"its files name the class {name}; allowed are the feature classes of TFDS")
        return class_of(name)

    connector.cls_from_name = known_class_of
    return tfds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the log and banners of TFDS. They would hide cnnlib's own one-line message."""
    import absl.logging  # noqa: F401  # import it first: its first import sets the level

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@quiet()
def prepared_set(data: Data, others: Sequence[str]) -> Origin:
    """Return the TFDS data set named `data.name`. If there is none, raise UserError. The message lists `others`."""
    if data.seed is not None:
        raise UserError(f"data.seed has no meaning for {data.name}: it is not generated")
    if data.data_dir is not None and not Path(data.data_dir).expanduser().is_dir():
        raise UserError(f"data.data_dir={data.data_dir} is no folder")
    if found := re.match(r"([\w-]+):[a-zA-Z]", data.name):  # what follows the colon is not a version
        raise UserError(f"data.name={data.name}: data sets of a namespace, such as {found[1]}, run their authors' code")
    tfds = import_tfds()
    # TFDS reads `TFDS_DATA_DIR` only once, at its import. A notebook may set the variable later.
    given = data.data_dir or os.environ.get("TFDS_DATA_DIR")
    directory = str(Path(given).expanduser()) if given else None
    try:
        builder = tfds.builder(data.name, data_dir=directory)
        if not builder.is_prepared():
            builder = tfds.builder(data.name, data_dir=directory, file_format="array_record")
        info = builder.info
    except ImportError as error:
        if "tensorflow" in str(error):
            raise UserError(_needs_tensorflow(data.name, error)) from error
        raise UserError(_unreadable(data.name, error)) from error
    except (ValueError, AssertionError, TypeError) as error:  # not found, unknown configuration, bad name
        folder = Path(directory or tfds.core.constants.DATA_DIR)
        prepared = sorted({path.parents[1].name for path in folder.glob("*/*/dataset_info.json")})
        raise UserError(
            f"no data set {data.name!r}; there are: {', '.join(others)}; in {folder}: "
            f"{', '.join(prepared) or 'none'}; and the image classification sets of tensorflow-datasets"
        ) from error
    except Exception as error:  # damaged files: TFDS and its file formats raise unrelated exceptions
        raise UserError(_unreadable(data.name, error)) from error
    image_key, label_key, shape, label = _image_classification(data.name, info)
    counts = _counts(data.name, builder.info.splits) if builder.is_prepared() else {}

    def prepare() -> None:
        with quiet():
            is_prepared = builder.is_prepared()
        if not is_prepared:
            _prepare(data.name, builder)
            _counts(data.name, builder.info.splits)

    def read() -> tuple[Split, Split]:
        prepare()
        try:
            train, test = (_decoded(builder, split, image_key, label_key) for split in ("train", "test"))
        except Exception as error:
            raise UserError(_unreadable(data.name, error)) from error
        return train, test

    def opened() -> tuple[Records, Records]:
        prepare()
        try:
            train, test = (Records(builder, data.name, split, image_key, label_key) for split in ("train", "test"))
        except Exception as error:
            raise UserError(_unreadable(data.name, error)) from error
        return train, test

    names = () if all(name.isdecimal() for name in label.names) else tuple(label.names)
    return Origin(builder.info.full_name, shape, label.num_classes, counts, read, names, opened=opened)


AT_A_TIME = 256
"""Number of stored records that are in memory at a time."""


class Records:
    """A split of a prepared set. Examples are read and decoded on demand (see `Source`)."""

    is_in_memory = False
    dtype = np.dtype(np.uint8)

    def __init__(self, builder: DatasetBuilder, name: str, split: str, image_key: str, label_key: str) -> None:
        self._name, self._split, self._keys = name, split, (image_key, label_key)
        self._folder = str(builder.data_path)
        self._labels_path = _cached_folder(builder) / f"{split}-y.npy"
        self.count = int(builder.info.splits[split].num_examples)
        self.input_shape: Shape = tuple(builder.info.features[image_key].shape)
        self._opened: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, indices: np.ndarray) -> Split:
        """Read and decode the examples at `indices`."""
        x, y = np.empty((len(indices), *self.input_shape), np.uint8), np.empty(len(indices), np.int32)
        try:
            with self._lock:
                if self._opened is None:
                    self._opened = self._open(*self._keys)
            for index, (encoded, label) in enumerate(self._opened(indices)):
                x[index], y[index] = pixels(encoded), label
        except Exception as error:
            raise UserError(_unreadable(self._name, error)) from error
        return Split(x, y)

    def labels(self) -> np.ndarray:
        """Return all classes. They are read once, without decoding images, and then cached."""
        cached = kept_array(self._labels_path, (self.count,), np.int32)
        if cached is not None:
            return cached
        try:
            read = self._open(self._keys[1])
            y = np.fromiter((label for (label,) in read(np.arange(self.count))), np.int32, self.count)
        except Exception as error:
            raise UserError(_unreadable(self._name, error)) from error
        keep_array(self._labels_path, y)
        return y

    def _open(self, *keys: str) -> Reader:
        with quiet():  # by its folder, as another process may not know the builder class
            builder = import_tfds().builder_from_directory(self._folder)
        return _reader(builder, self._split, *keys)


Reader = Callable[[np.ndarray], Iterator[list[Any]]]
"""Yields the requested features of the examples at given positions. An image is returned as the bytes of its file."""


def _reader(builder: DatasetBuilder, split: str, *keys: str) -> Reader:
    """Open a split. The returned function reads only the features in `keys`."""
    tfds = import_tfds()
    with quiet():
        source = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
    encoded = [key for key in keys if isinstance(features[key], tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in encoded}

    def read(indices: np.ndarray) -> Iterator[list[Any]]:
        for start in range(0, len(indices), AT_A_TIME):
            for record in source.__getitems__(indices[start : start + AT_A_TIME].tolist()):
                example = features.deserialize_example_np(record, decoders=decoders)
                yield [example[key] for key in keys]

    return read


def pixels(encoded: bytes) -> np.ndarray:
    """Decode an image file to a uint8 array `(height, width, channel)`. Raise UserError for other formats."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            array = np.asarray(image, np.uint8)
    except UnidentifiedImageError as error:  # its message names only a Python object
        raise UserError(f"an image has none of the formats {', '.join(IMAGE_FORMATS)}") from error
    return array if array.ndim == 3 else array[..., None]


def _counts(name: str, splits: SplitDict) -> dict[str, int]:
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


def _image_classification(name: str, info: DatasetInfo) -> tuple[str, str, Shape, Any]:
    """Return the image key, label key, image shape and label feature. Raise UserError if the set is unsuitable."""
    tfds = import_tfds()
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


def _prepare(name: str, builder: DatasetBuilder) -> None:
    """Download and prepare a data set. TFDS shows its own progress."""
    if type(builder).__module__ in PREPARED_WITH_TENSORFLOW and importlib.util.find_spec("tensorflow") is None:
        raise UserError(_needs_tensorflow(name, f"it is not yet in {builder.data_path.parent.parent}"))
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise UserError(_needs_tensorflow(name, error)) from error
    except Exception as error:
        # The many builders of TFDS raise anything (network, checksum, manual download); `--traceback` shows the cause.
        raise UserError(f"tensorflow-datasets could not prepare {name}: {_first_line(error)}") from error


def _decoded(builder: DatasetBuilder, split: str, image_key: str, label_key: str) -> Split:
    """Return a split as arrays. It is decoded once and then cached. The cache key includes `dataset_info.json`."""
    count = builder.info.splits[split].num_examples
    shape = (count, *builder.info.features[image_key].shape)
    folder = _cached_folder(builder)
    paths = folder / f"{split}-x.npy", folder / f"{split}-y.npy"
    x, y = kept_array(paths[0], shape, np.uint8), kept_array(paths[1], (count,), np.int32)
    if x is not None and y is not None:
        return Split(x, y)
    read = _reader(builder, split, image_key, label_key)
    x, y = np.empty(shape, np.uint8), np.empty(count, np.int32)
    for index, (encoded, label) in enumerate(read(np.arange(count))):
        x[index], y[index] = pixels(encoded), label
    for path, array in zip(paths, (x, y), strict=True):
        keep_array(path, array)
    return Split(x, y)


def _cached_folder(builder: DatasetBuilder) -> Path:
    """Return the cache folder of a set's decoded examples."""
    identity = f"{builder.data_path}\n{(Path(builder.data_path) / 'dataset_info.json').read_text()}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder("data") / f"{builder.info.full_name.replace('/', '-')}-{key}"
