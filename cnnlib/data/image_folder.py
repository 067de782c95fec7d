"""Convert your own images to a prepared TFDS data set, so that `data.name` can name it. TensorFlow is not needed."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.data.sets import Split, is_ours, quiet, stratified
from cnnlib.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
"""Pillow's names for the formats of `ENDINGS`. Without this list, Pillow would detect the format from the content. For
EPS content it would start Ghostscript, whatever the file's name is."""
VERSION = "1.0.0"


def from_folder(
    images: Path | str,
    name: str,
    data_dir: Path | str,
    size: tuple[int, int] | None = None,
    grey: bool = False,
    test_share: float = 0.2,
) -> Path:
    """Prepare image files as the data set `name` in `data_dir`, and return its folder.

    Folders are classes: `images/train/CLASS/*` and `images/test/CLASS/*`, or only `images/CLASS/*`. If there are no
    `train` and `test` folders, a random part of each class becomes the test split. Its share is `test_share`, and the
    seed is fixed. Hidden files and folders are ignored. `size` is (height, width) in pixels. All images are scaled to
    this size; if it is None, no image is scaled. Images get one channel if `grey` is true, and three channels (RGB) if
    not. Transparent parts become white, and EXIF rotation is applied. Raise UserError if there are no images, a class
    is missing from a split, sizes differ, or a file is not an image of 8 bits per channel.
    """
    if size is not None and not (isinstance(size, tuple) and len(size) == 2 and min(size) >= 1):
        raise UserError(f"size={size}: height and width in pixels, such as (32, 32)")
    root = Path(images).expanduser()
    if not root.is_dir():
        raise UserError(f"there is no folder {images}")
    parts = [root / split for split in ("train", "test")]
    if any(part.is_dir() for part in parts):
        names = sorted({name for part in parts for name in folders(part)})
        train, test = (read_classes(part, names, size, grey) for part in parts)
    else:
        names = folders(root)
        if not 0 < test_share < 1:
            raise UserError(f"test_share={test_share}: it must lie between 0 and 1, such as 0.2")
        whole = read_classes(root, names, size, grey)
        is_test = stratified(whole.y, round(test_share * len(whole.y)))
        for label, class_name in enumerate(names):
            own = is_test[whole.y == label]
            if own.all() or not own.any():
                raise UserError(
                    f"class {class_name} has too few images, {len(own)}: test_share={test_share} leaves none of it to "
                    "train on or none to test with"
                )
        train, test = (Split(whole.x[mask], whole.y[mask]) for mask in (~is_test, is_test))
    return from_arrays(name, data_dir, train, test, names)


def folders(place: Path) -> list[str]:
    """Return the sorted names of the folders in `place`, without hidden folders and without `__MACOSX`."""
    found = place.iterdir() if place.is_dir() else ()
    return sorted(path.name for path in found if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def read_classes(folder: Path, names: Sequence[str], size: tuple[int, int] | None, grey: bool) -> Split:
    """Read the images of `folder/CLASS/*`. Classes have the order of `names`, and files are sorted by name."""
    x, y, first = [], [], None
    for label, name in enumerate(names):
        files = sorted(path for path in (folder / name).glob("[!.]*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise UserError(f"no images in {folder / name}; endings are: {', '.join(ENDINGS)}")
        for path in files:
            pixels = read_image(path, size, grey)
            first = first or (path, pixels.size)
            if pixels.size != first[1]:
                texts = (f"{where} is {width}x{height}" for where, (width, height) in (first, (path, pixels.size)))
                raise UserError(f"images of one size are needed: {', '.join(texts)}; size=(HEIGHT, WIDTH) scales them")
            x.append(np.asarray(pixels, np.uint8).reshape(pixels.height, pixels.width, -1))
            y.append(label)
    if not x:
        raise UserError(f"no classes in {folder}: it needs a folder of images for each")
    return Split(np.stack(x), np.asarray(y, np.int32))


def read_image(path: Path, size: tuple[int, int] | None, grey: bool) -> Any:
    """Read an image file as an RGB or grey Pillow image. Rotate and scale it, and make transparent parts white."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path} has more than 8 bits a channel: it must be saved with 8")
            if image.has_transparency_data:
                opaque = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque)
            image = image.convert("L" if grey else "RGB")
    except OSError as error:
        raise UserError(f"{path} is no image: {' '.join(str(error).split())}") from error
    return image if size is None else image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def from_arrays(name: str, data_dir: Path | str, train: Split, test: Split, class_names: Sequence[str]) -> Path:
    """Prepare arrays as the data set `name` in `data_dir`, and return its folder.

    Images are uint8 arrays `(count, height, width, channel)`. They have 1 or 3 channels. Classes are whole numbers, and
    the first class is 0. Once the new set is complete, it replaces an earlier set of that name. Raise UserError if
    `name` is not a lower-case identifier or names a built-in or TFDS set, if the arrays do not have this form, or if a
    label has no class name.
    """
    import tensorflow_datasets as tfds

    _check_arrays(name, train, test, class_names)
    splits = {"train": train, "test": test}
    # The description is part of the cache key of decoded examples. The digest gives different images different keys.
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in (*train, *test))).hexdigest()

    with tfds.core.registered.skip_registration():

        class OwnImages(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
            """The user's own images."""

            VERSION = tfds.core.Version(VERSION)
            pkg_dir_path = Path()  # TFDS looks here for notes on the set; there are none

            def _info(self) -> Any:
                image = tfds.features.Image(shape=train.x.shape[1:])
                features = {"image": image, "label": tfds.features.ClassLabel(names=list(class_names))}
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=f"Own images, SHA-256 {digest}.",
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                x, y = splits[split]
                for index, (pixels, label) in enumerate(zip(x, y, strict=True)):
                    yield index, {"image": png(pixels), "label": int(label)}

    OwnImages.name = name
    root = Path(data_dir).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as beside:
        with quiet():
            builder = OwnImages(data_dir=beside, file_format="array_record")
            builder.download_and_prepare()
        made = root / name / VERSION
        if made.exists():
            shutil.rmtree(made)
        made.parent.mkdir(exist_ok=True)
        Path(builder.data_path).rename(made)
    return made


def _check_arrays(name: str, train: Split, test: Split, class_names: Sequence[str]) -> None:
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"a data set's name is made of a-z, 0-9 and '_', and begins with a letter, not {name!r}")
    if is_ours(name) or name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"{name!r} is another data set, which would be read in its place; my_{name} is not")
    for x, y in (train, test):
        is_images = x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1:] == train.x.shape[1:]
        if not is_images or len(x) == 0 or np.shape(y) != x.shape[:1]:
            raise UserError(
                f"{name}: images are uint8 (count, height, width, 1 or 3), of one size in both splits, with a class "
                f"each, not {x.dtype} {x.shape} with {np.shape(y)} classes"
            )
        if y.min() < 0 or y.max() >= len(class_names):
            raise UserError(f"{name}: classes lie in {y.min()}..{y.max()}, and there are {len(class_names)} names")


def png(pixels: np.ndarray) -> io.BytesIO:
    """Encode a uint8 image `(height, width, 1 or 3)` as PNG; TFDS stores encoded images as they are."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png")
    file.seek(0)
    return file
