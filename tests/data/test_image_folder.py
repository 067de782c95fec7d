from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from cnnlib.data.declaration import Data
from cnnlib.data.image_folder import ENDINGS, from_arrays, from_folder, read_image
from cnnlib.data.sets import Split, load
from cnnlib.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw(folder, counts, size=(6, 5), start=0):
    """Image i of a class is filled with (start + i, 10, class); returns the folder."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.broadcast_to(np.asarray([start + i, 10, label], np.uint8), (*size, 3))
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


def test_folders_of_classes_become_a_data_set_that_is_read_by_its_name(tmp_path):
    draw(tmp_path / "images" / "train", {"cat": 5, "dog": 4})
    draw(tmp_path / "images" / "test", {"cat": 2, "dog": 3}, start=100)
    made = from_folder(tmp_path / "images", "pets", tmp_path / "tfds")
    assert made == tmp_path / "tfds" / "pets" / "1.0.0"
    data = load(Data("pets", data_dir=str(tmp_path / "tfds")))
    assert data.description.class_names == ("cat", "dog") and data.description.input_shape == (6, 5, 3)
    assert data.description.counts == {"train": 9, "validation": 0, "test": 5}
    found = sorted((int(y), *map(int, x[0, 0])) for x, y in zip(*data.test, strict=True))
    assert found == [(0, 100, 10, 0), (0, 101, 10, 0), (1, 100, 10, 1), (1, 101, 10, 1), (1, 102, 10, 1)]
    assert "tensorflow" not in sys.modules


def test_without_splits_a_share_of_each_class_is_for_testing(tmp_path):
    draw(tmp_path / "images", {"a": 20, "b": 10})
    from_folder(tmp_path / "images", "letters", tmp_path / "tfds", test_share=0.3)
    data = load(Data("letters", data_dir=str(tmp_path / "tfds")))
    assert np.bincount(data.test.y).tolist() == [6, 3] and np.bincount(data.train.y).tolist() == [14, 7]
    everything = np.concatenate([data.train.x, data.test.x])[:, 0, 0]
    assert len(np.unique(everything, axis=0)) == 30  # each image once


def test_images_are_scaled_and_made_grey_where_it_is_asked_for(tmp_path):
    draw(tmp_path / "images" / "train", {"a": 2}, size=(6, 5))
    draw(tmp_path / "images" / "test", {"a": 2}, size=(9, 9))
    from_folder(tmp_path / "images", "greys", tmp_path / "tfds", size=(4, 3), grey=True)
    data = load(Data("greys", data_dir=str(tmp_path / "tfds")))
    assert data.train.x.shape == (2, 4, 3, 1)
    assert set(np.unique(data.train.x).tolist()) == {6}  # 0.299 r + 0.587 g + 0.114 b, of (0 or 1, 10, 0)


def test_what_is_hidden_is_left_out_and_photographs_are_upright_and_opaque(tmp_path):
    images = tmp_path / "images"
    for part in ("train", "test"):
        draw(images / part, {"a": 1}, size=(8, 4))
    (images / "train" / ".ipynb_checkpoints").mkdir()
    (images / "train" / "a" / "._000.png").write_bytes(b"what an archive hides")
    clear = np.zeros((8, 4, 4), np.uint8)  # black, and transparent but for the first row
    clear[0, :, 3] = 255
    Image.fromarray(clear).save(images / "train" / "a" / "001.png")
    lying = Image.new("RGB", (8, 4), "red")
    told = lying.getexif()
    told[0x0112] = 6  # to be turned by a quarter
    lying.save(images / "train" / "a" / "002.jpg", exif=told)
    from_folder(images, "mine", tmp_path / "tfds")
    data = load(Data("mine", data_dir=str(tmp_path / "tfds")))
    assert data.description.class_names == ("a",) and data.train.x.shape == (3, 8, 4, 3)
    (ink,) = (image for image in data.train.x if image[0, 0].tolist() == [0, 0, 0] and image[1, 0, 0] == 255)
    assert (ink[1:] == 255).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "gif", "webp", "mpo"])
def test_files_of_all_endings_are_read_whatever_the_ending_says(kind, tmp_path):
    for ending in ENDINGS:
        path = tmp_path / f"image{ending}"
        Image.new("RGB", (5, 6), "white").save(path, kind)  # a phone's JPEG may be an MPO: several in one
        assert np.asarray(read_image(path, None, False)).tolist() == np.full((6, 5, 3), 255).tolist()


def test_a_set_is_made_anew_and_read_anew(tmp_path):
    for value in (1, 2):
        split = Split(np.full((3, 4, 4, 1), value, np.uint8), np.zeros(3, np.int32))
        from_arrays("flat", tmp_path, split, split, ["all"])
        assert (load(Data("flat", data_dir=str(tmp_path))).test.x == value).all()


def test_what_is_wrong_is_one_line(tmp_path):
    draw(tmp_path / "uneven", {"a": 1})
    draw(tmp_path / "uneven2" / "train", {"a": 1, "b": 1})
    draw(tmp_path / "uneven2" / "test", {"a": 1})
    Image.new("RGB", (3, 3)).save(tmp_path / "uneven" / "a" / "zzz.png")
    broken = draw(tmp_path / "broken", {"a": 1})
    (broken / "a" / "b.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "few", {"a": 20, "b": 1})
    deep = draw(tmp_path / "deep", {"a": 0}) / "a"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep / "000.png")
    for call, told in (
        (lambda: from_folder(tmp_path / "nowhere", "x", tmp_path), "there is no folder"),
        (lambda: from_folder(tmp_path / "few", "x", tmp_path), "class b has too few images, 1: test_share=0.2"),
        (lambda: from_folder(tmp_path / "deep", "x", tmp_path), "000.png has more than 8 bits"),
        (lambda: from_folder(tmp_path / "few", "x", tmp_path, size=32), r"size=32: height and width.*\(32, 32\)"),
        (lambda: from_folder(tmp_path / "few", "x", tmp_path, size=(0, 3)), "height and width"),
        (lambda: from_arrays("mnist", tmp_path, *[split(4)] * 2, ["a"]), "'mnist' is another data set.*my_mnist"),
        (lambda: from_arrays("lines", tmp_path, *[split(4)] * 2, ["a"]), "'lines' is another data set"),
        (lambda: from_arrays("dsd_4x4", tmp_path, *[split(4)] * 2, ["a"]), "'dsd_4x4' is another data set"),
        (lambda: from_folder(tmp_path / "empty", "x", tmp_path), "no classes in"),
        (lambda: from_folder(tmp_path / "uneven", "x", tmp_path), r"000.png is 5x6, .*zzz.png is 3x3; size="),
        (lambda: from_folder(tmp_path / "uneven2", "x", tmp_path), "no images in .*test/b"),
        (lambda: from_folder(tmp_path / "broken", "x", tmp_path), "b.png is no image"),
        (lambda: from_folder(tmp_path / "uneven", "x", tmp_path, test_share=2.0), "between 0 and 1"),
        (lambda: from_arrays("X y", tmp_path, *[split(4)] * 2, ["a"]), "a-z, 0-9"),
        (lambda: from_arrays("x", tmp_path, split(4), split(5), ["a"]), "of one size in both splits"),
        (lambda: from_arrays("x", tmp_path, split(4), split(4), []), "0 names"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def split(side):
    return Split(np.zeros((2, side, side, 1), np.uint8), np.zeros(2, np.int32))
