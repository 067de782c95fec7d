"""A data set of TensorFlow Datasets is prepared, read and opened, damaged or not."""

from __future__ import annotations

import io
import pickle
import shutil
import sys

import numpy as np
import pytest

from cnnlib.data import sets as data_module
from cnnlib.data.declaration import Data
from cnnlib.data.sets import describe, load, open_splits, size_in_bytes
from cnnlib.errors import UserError

# A TFDS builder of our own, which prepares without TensorFlow: PNG bytes in, array_record out.


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The name of a registered, unprepared TFDS set of 30 + 12 colour images of 5x4, and a folder to prepare it in."""
    import tensorflow_datasets as tfds
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class TinyColors(tfds.core.GeneratorBasedBuilder):
        """Every pixel of image i is (i, 2 i, class)."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {"image": tfds.features.Image(shape=(5, 4, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 30), "test": self._generate_examples(30, 42)}

        def _generate_examples(self, first, last):
            for i in range(first, last):
                file = io.BytesIO()
                pixels = np.broadcast_to(np.asarray([i, 2 * i, i % 3], np.uint8), (5, 4, 3))
                Image.fromarray(pixels).save(file, "png")
                file.seek(0)
                yield i, {"image": file, "label": i % 3}

    folder = tmp_path / "tfds"
    folder.mkdir()
    yield "tiny_colors", folder
    del tfds.core.registered._DATASET_REGISTRY["tiny_colors"]


def test_a_tfds_set_is_prepared_then_read_without_tensorflow(tiny):
    name, folder = tiny
    data = Data(name, data_dir=str(folder), validation=6)
    assert describe(data).counts == {}
    data_set = load(data)
    assert data_set.description.name == "tiny_colors/1.0.0"
    assert data_set.description.counts == {"train": 24, "validation": 6, "test": 12}
    assert data_set.description == describe(data)
    for x, y in (data_set.train, data_set.validation, data_set.test):
        for image, label in zip(x, y, strict=True):
            i = int(image[0, 0, 0])
            assert label == i % 3 and np.all(image == [i, 2 * i, i % 3])
    assert "tensorflow" not in sys.modules


def test_tfds_data_dir_is_honoured_and_decoding_is_cached(tiny, monkeypatch):
    name, folder = tiny
    first = load(Data(name, data_dir=str(folder)))
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.as_data_source", None)  # decoding again would fail
    again = load(Data(name))
    np.testing.assert_array_equal(first.test.x, again.test.x)
    np.testing.assert_array_equal(first.test.y, again.test.y)


def test_a_damaged_cache_is_decoded_again(tiny, tmp_path):
    name, folder = tiny
    first = load(Data(name, data_dir=str(folder)))
    (cached,) = (tmp_path / "cache").rglob("test-x.npy")
    np.save(cached, np.zeros(3))  # whole, but not ours
    np.testing.assert_array_equal(load(Data(name, data_dir=str(folder))).test.x, first.test.x)


def test_a_cache_that_is_cut_off_is_decoded_again(tiny, tmp_path):
    name, folder = tiny
    first = load(Data(name, data_dir=str(folder)))
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100] if "-x" in file.name else b"")
    np.testing.assert_array_equal(load(Data(name, data_dir=str(folder))).test.x, first.test.x)


@pytest.mark.parametrize("damage", ["cut off", "missing", "no description"])
def test_a_damaged_data_set_is_said_in_one_line(damage, tiny):
    name, folder = tiny
    load(Data(name, data_dir=str(folder)))
    shutil.rmtree(folder.parent / "cache")
    (records,) = folder.rglob("*test.array_record*")
    if damage == "cut off":
        records.write_bytes(records.read_bytes()[:50])
    elif damage == "missing":
        records.unlink()
    else:
        next(folder.rglob("dataset_info.json")).write_text("{")
    with pytest.raises(UserError) as error:
        load(Data(name, data_dir=str(folder)))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_prepared_set_is_opened_without_decoding_what_is_not_read(tiny, tmp_path, monkeypatch):
    from PIL import Image

    name, folder = tiny
    data = Data(name, data_dir=str(folder), validation=6)
    assert size_in_bytes(data) == 42 * 5 * 4 * 3  # prepares it
    decoded = []
    monkeypatch.setattr(
        Image, "open", lambda *given, old=Image.open, **named: decoded.append(1) or old(*given, **named)
    )
    opened = open_splits(data)
    assert len(decoded) == 24  # for mean and deviation
    assert opened.train.labels().tolist() == [int(x[0, 0, 0]) % 3 for x in opened.train.read(np.arange(24)).x]
    del decoded[:]
    x, y = opened.validation.read(np.array([3, 1]))
    assert len(decoded) == 2 and y.tolist() == [int(image[0, 0, 0]) % 3 for image in x]
    assert {path.name for path in (tmp_path / "cache").rglob("*.npy")} == {"train-y.npy"}
    loaded = load(data)
    assert opened.description == loaded.description
    np.testing.assert_array_equal(opened.validation.read(np.arange(6)).x, loaded.validation.x)
    np.testing.assert_array_equal((opened.mean, opened.deviation), (loaded.mean, loaded.deviation))


@pytest.mark.parametrize("name", ["lines_256x300000", "tiny_colors"])
def test_sources_are_cheap_to_hand_to_another_process(name, tiny):
    data = Data("lines_256x300000") if name != "tiny_colors" else Data(name, data_dir=str(tiny[1]))
    source = open_splits(data).test if name == "tiny_colors" else data_module._origin(data).open()[1]
    source.read(np.array([0]))
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    np.testing.assert_array_equal(again.read(np.array([5])).x, source.read(np.array([5])).x)
