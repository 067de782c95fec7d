"""Filters that slide over images, and pooling, spelled out step by step; NumPy only.

An image is `(height, width)` or `(height, width, channel)`, a kernel has the axes of its image, and all is computed in
float64. A window is placed by its size, strides, padding and dilation, as `spec` has them. What is written here as a
loop or as one matrix product to be looked at, `ops` computes for batches, fast and with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cnnlib.errors import UserError
from cnnlib.spec import Padding, PerAxis, Shape, Window, pool_window, shape_text, window_arguments, window_over

Place = tuple[int, int]
"""A row and a column, from 0 on; of an image they are negative on the padding before it."""

LINE_FILTERS = ("vertical", "horizontal", "diagonal", "antidiagonal")
"""Orientations of lines: a diagonal falls from left to right, an antidiagonal rises."""


# Filters, and something to slide them over.


def line_filter(kind: str, size: int = 3) -> np.ndarray:
    """A filter `(size, size)` for lines of one orientation: size - 1 on the line through its middle, -1 beside it.

    It sums to 0 across the line, and so as a whole: a flat area gives 0, a line of its own orientation
    size (size - 1), and one of another orientation 0 where it passes through the middle. Raises UserError for an
    orientation that is not in `LINE_FILTERS`, and for a size without a middle or with nothing beside it.
    """
    if kind not in LINE_FILTERS:
        raise UserError(f"no line filter {kind!r}; there are: {', '.join(LINE_FILTERS)}")
    if size < 3 or size % 2 == 0:
        raise UserError(f"a line filter has a middle and something beside it: an odd size from 3 on, not {size}")
    row, column = np.indices((size, size))
    on_line = {
        "vertical": column == size // 2,
        "horizontal": row == size // 2,
        "diagonal": row == column,
        "antidiagonal": row + column == size - 1,
    }
    return np.where(on_line[kind], size - 1.0, -1.0)


def strokes(shape: Sequence[int], lines: Iterable[tuple[Place, Place]]) -> np.ndarray:
    """An image `(height, width)` of lines: 1 on each from a pixel to another, both included, elsewhere 0.

    Raises UserError for a line that leaves the image.
    """
    image = np.zeros(tuple(shape))
    for start, end in lines:
        if not all(0 <= at < side for place in (start, end) for at, side in zip(place, image.shape, strict=True)):
            raise UserError(f"the line from {start} to {end} leaves the image of {shape_text(image.shape)}")
        count = max(abs(b - a) for a, b in zip(start, end, strict=True)) + 1
        rows, columns = (np.rint(np.linspace(a, b, count)).astype(int) for a, b in zip(start, end, strict=True))
        image[rows, columns] = 1.0
    return image


# Windows.


def window_for(
    shape: Sequence[int], size: PerAxis, *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> Window:
    """The window that slides over images of a shape; its `output_size` is the size of the map.

    Of n pixels floor((n + zeros - span) / stride) + 1 places, with span = (size - 1) dilation + 1: n - size + 1 at
    stride 1 without padding, n with SAME. Raises UserError for numbers that make no window of such an image.
    """
    spatial = _checked_shape(shape)[:2]
    kept, pads = window_arguments("window", {"size": size, "strides": strides, "dilation": dilation}, padding)
    return window_over((*spatial, 1), "window", **kept, padding=pads)


def windows_of(image: np.ndarray, window: Window, fill: float = 0.0) -> np.ndarray:
    """What is under the window at each of its places, `(*places, *size)` or `(*places, *size, channel)`.

    Padding is `fill`. Raises UserError for an image of another size than the window is for.
    """
    image = _checked_image(image)
    if image.shape[:2] != window.input_size:
        sizes = f"{shape_text(window.input_size)}, not of {shape_text(image.shape[:2])}"
        raise UserError(f"the window is for images of {sizes}")
    pads = (*window.padding, *((0, 0),) * (image.ndim - 2))
    padded = np.pad(image, pads, constant_values=fill)
    rows, columns = (
        np.arange(places)[:, None] * stride + np.arange(taps) * spread
        for places, stride, taps, spread in zip(
            window.output_size, window.strides, window.size, window.dilation, strict=True
        )
    )
    return np.asarray(padded[rows[:, None, :, None], columns[None, :, None, :]])


def times_seen(window: Window) -> np.ndarray:
    """In how many places of the window each pixel is under one of its taps, integers `(height, width)`."""
    under = _pixels_under(window, window.input_size)
    counts = np.bincount(under[under >= 0], minlength=math.prod(window.input_size))
    return np.asarray(counts.reshape(window.input_size))


def share_on_padding(window: Window) -> float:
    """The share, 0 to 1, of taps that fall on the padding: multiply-adds with a zero."""
    return 1 - window.taps_inside / (math.prod(window.output_size) * math.prod(window.size))


# A filter slides.


class Step(NamedTuple):
    """One place of a filter that slides."""

    place: Place
    """In the map."""
    corner: Place
    """The pixel under the filter's first tap."""
    window: np.ndarray
    """What is under the filter, with its axes."""
    product: np.ndarray
    """The same times the filter, number by number."""
    total: float
    """Their sum: the map at this place."""


def steps(
    image: np.ndarray, kernel: np.ndarray, *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> Iterator[Step]:
    """The filter's places one after another, row by row; raises UserError where filter and image do not fit."""
    image, kernel = _checked_image(image), np.asarray(kernel, np.float64)
    window = _window_of_kernel(image.shape, kernel.shape, strides, padding, dilation)
    windows = windows_of(image, window)
    for row, column in np.ndindex(*windows.shape[:2]):
        place = row, column
        product = windows[place] * kernel
        yield Step(place, _corner(window, place), windows[place], product, float(product.sum()))


def slide(
    image: np.ndarray, kernel: np.ndarray, *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> np.ndarray:
    """The map `(rows, columns)` of a filter slid over an image, not mirrored: what nets call a convolution.

    As a loop over its places. Raises UserError as `steps` does.
    """
    taken = list(steps(image, kernel, strides=strides, padding=padding, dilation=dilation))
    rows, columns = taken[-1].place
    return np.reshape([step.total for step in taken], (rows + 1, columns + 1))


class Product(NamedTuple):
    """A convolution as the product of two matrices."""

    windows: np.ndarray
    """Every window as a row, `(place, tap)`: places and taps row by row, a tap's channels beside each other."""
    filters: np.ndarray
    """Every filter as a column, `(tap, filter)`."""
    maps: np.ndarray
    """Their product, folded: `(rows, columns, filter)`."""


def as_product(
    image: np.ndarray, kernels: np.ndarray, *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> Product:
    """Several filters slid over an image, as one product of matrices.

    `kernels` are `(height, width, filter)` for an image without channels, else `(height, width, channel, filter)`.
    Raises UserError where filters and image do not fit.
    """
    image, kernels = _checked_image(image), np.asarray(kernels, np.float64)
    window = _window_of_kernel(image.shape, kernels.shape[:-1], strides, padding, dilation)
    rows = windows_of(image, window).reshape(math.prod(window.output_size), -1)
    columns = kernels.reshape(rows.shape[1], kernels.shape[-1])
    return Product(rows, columns, (rows @ columns).reshape(*window.output_size, kernels.shape[-1]))


def matrix_of(
    kernel: np.ndarray, shape: Sequence[int], *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> np.ndarray:
    """The weights `(place, pixel)` of a full layer that computes what `slide` does, from a flattened image.

    A row holds the filter's numbers at the pixels under it and zeros elsewhere: without padding every row holds the
    same numbers, with it those over the zeros are left out.
    Pixels are row by row, a pixel's channels beside each other. Raises UserError as `steps` does.
    """
    shape, kernel = _checked_shape(shape), np.asarray(kernel, np.float64)
    under = _pixels_under(_window_of_kernel(shape, kernel.shape, strides, padding, dilation), shape)
    place, tap = np.nonzero(under >= 0)
    matrix = np.zeros((len(under), math.prod(shape)))
    matrix[place, under[place, tap]] = kernel.ravel()[tap]
    return matrix


# Pooling.


class Block(NamedTuple):
    """One place of a pooling."""

    place: Place
    """In the pooled map."""
    corner: Place
    """The block's first pixel."""
    values: np.ndarray
    """What is in the block, `(rows, columns)`, padding left out."""
    winner: Place
    """The pixel with the largest value, of equal ones the first, row by row."""
    largest: float
    mean: float
    """Over the whole block: zeros of the padding count as values."""


def pool_blocks(
    image: np.ndarray, size: PerAxis = 2, *, strides: PerAxis | None = None, padding: Padding = "VALID"
) -> Iterator[Block]:
    """The blocks of a pooling one after another, row by row, of an image without channels.

    `strides` are the block's size where none are given; smaller ones make blocks overlap. Raises UserError for blocks
    that the image does not hold, and for padding that could fill one.
    """
    image = _checked_image(image)
    if image.ndim != 2:
        raise UserError(f"blocks are shown of one channel, (height, width), not of shape {image.shape}")
    window = _pooling_window(image.shape, size, strides, padding)
    for row, column in np.ndindex(*window.output_size):
        place = row, column
        corner = _corner(window, place)
        top, left = (max(0, at) for at in corner)
        bottom, right = (at + side for at, side in zip(corner, window.size, strict=True))
        values = image[top:bottom, left:right]
        inside_row, inside_column = divmod(int(values.argmax()), values.shape[1])
        winner = top + inside_row, left + inside_column
        yield Block(place, corner, values, winner, float(values.max()), float(values.sum() / math.prod(window.size)))


def max_pool(
    image: np.ndarray, size: PerAxis = 2, *, strides: PerAxis | None = None, padding: Padding = "VALID"
) -> np.ndarray:
    """The largest value of each block, each channel by itself; padding never wins. Arguments as for `pool_blocks`."""
    image = _checked_image(image)
    blocks = windows_of(image, _pooling_window(image.shape, size, strides, padding), -math.inf)
    return np.asarray(blocks.max(axis=(2, 3)))


def average_pool(
    image: np.ndarray, size: PerAxis = 2, *, strides: PerAxis | None = None, padding: Padding = "VALID"
) -> np.ndarray:
    """The mean of each block, each channel by itself; zeros of the padding count. Arguments as for `pool_blocks`."""
    image = _checked_image(image)
    blocks = windows_of(image, _pooling_window(image.shape, size, strides, padding))
    return np.asarray(blocks.mean(axis=(2, 3)))


# Small shifts.


def shifted(image: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
    """The image moved by so many pixels, negative ones up and to the left; zeros come in, what leaves is lost."""
    image = _checked_image(image)
    moved = np.zeros_like(image)
    into, out_of = [], []
    for shift, side in zip((down, right), image.shape, strict=False):
        kept = max(0, side - abs(shift))
        into.append(slice(max(0, shift), max(0, shift) + kept))
        out_of.append(slice(max(0, -shift), max(0, -shift) + kept))
    moved[tuple(into)] = image[tuple(out_of)]
    return moved


def shift_change(
    function: Callable[[np.ndarray], np.ndarray], image: np.ndarray, shifts: Iterable[tuple[int, int]]
) -> np.ndarray:
    """How much a map changes when the image is moved by each `(down, right)`: the norm of the change over the map's.

    0 is no change, and two maps that have nothing in common, of one norm, differ by the root of 2. Raises UserError for
    a map of zeros, to which nothing can be compared.
    """
    still = function(image)
    norm = float(np.linalg.norm(still))
    if norm == 0:
        raise UserError("the map is 0 everywhere: no change can be compared to it")
    moved = [function(shifted(image, down, right)) for down, right in shifts]
    return np.array([float(np.linalg.norm(other - still)) / norm for other in moved])


def _checked_shape(shape: Sequence[int]) -> Shape:
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UserError(f"an image is (height, width) or (height, width, channel), none of them 0, not {tuple(shape)}")
    return tuple(shape)


def _checked_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image, np.float64)
    _checked_shape(image.shape)
    return image


def _window_of_kernel(
    shape: Shape, kernel_shape: Shape, strides: PerAxis, padding: Padding, dilation: PerAxis
) -> Window:
    """The window of a kernel over an image; raises UserError where it has other axes or channels than the image."""
    if len(kernel_shape) != len(shape) or kernel_shape[2:] != shape[2:]:
        raise UserError(f"a filter of shape {kernel_shape} does not slide over an image of shape {shape}")
    return window_for(shape, kernel_shape[:2], strides=strides, padding=padding, dilation=dilation)


def _pooling_window(shape: Shape, size: PerAxis, strides: PerAxis | None, padding: Padding) -> Window:
    kept, pads = window_arguments("pool", {"size": size, "strides": size if strides is None else strides}, padding)
    return pool_window((*shape[:2], 1), "block", kept["size"], kept["strides"], pads)


def _pixels_under(window: Window, shape: Shape) -> np.ndarray:
    """Which number of a flattened image is under each tap, integers `(place, tap)`; -1 on the padding."""
    numbered = np.arange(math.prod(shape)).reshape(shape)
    return windows_of(numbered, window, -1).reshape(math.prod(window.output_size), -1).astype(np.int64)


def _corner(window: Window, place: Place) -> Place:
    row, column = (
        at * stride - before for at, stride, (before, _) in zip(place, window.strides, window.padding, strict=True)
    )
    return row, column
