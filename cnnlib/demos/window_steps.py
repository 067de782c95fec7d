"""Slide filters over images and pool images, step by step. This file uses only NumPy.

An image is `(height, width)` or `(height, width, channel)`. A kernel has the same axes as its image. All computations
use float64. A window has a size, strides, padding and dilation, as in `cnnlib.spec`. This file uses loops and matrix
products that are easy to read. `cnnlib.ops` computes the same results for batches, faster and with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cnnlib.errors import UserError
from cnnlib.spec.window import Padding, PerAxis, Shape, Window, pool_window, shape_text, window_arguments, window_over

Place = tuple[int, int]
"""A row and a column, counted from 0. Places on the padding above or left of an image have negative numbers."""

LINE_FILTERS = ("vertical", "horizontal", "diagonal", "antidiagonal")
"""Orientations of lines. If you go from left to right, a diagonal goes down, and an antidiagonal goes up."""


# Filters and images.


def line_filter(kind: str, size: int = 3) -> np.ndarray:
    """Return a filter `(size, size)` for lines of one orientation.

    The weights are `size - 1` on the line through the middle of the filter, and -1 elsewhere. The weights across the
    line sum to 0, so all weights of the filter sum to 0. Over a flat area, the filter gives 0. Over a line of its own
    orientation, the filter gives `size * (size - 1)`. Over a line of another orientation through the middle, the filter
    gives 0. Raises UserError if `kind` is not in `LINE_FILTERS`, or `size` is even or below 3.
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
    """Return an image `(height, width)`, which is 1 on lines and 0 elsewhere. Each line includes its two end pixels.

    Raises UserError if a line leaves the image.
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
    """Return the window that slides over images of size `shape`. Its attribute `output_size` is the size of the map.

    Along an axis of n pixels, the window has floor((n + zeros - span) / stride) + 1 places. Here `zeros` is the number
    of padded pixels, and span = (size - 1) dilation + 1. If stride and dilation are 1, there are n - size + 1 places
    without padding, and n places with SAME padding. Raises UserError if the arguments give no window on the image.
    """
    spatial = _checked_shape(shape)[:2]
    kept, pads = window_arguments("window", {"size": size, "strides": strides, "dilation": dilation}, padding)
    return window_over((*spatial, 1), "window", **kept, padding=pads)


def windows_of(image: np.ndarray, window: Window, fill: float = 0.0) -> np.ndarray:
    """Return an array `(*places, *size)` or `(*places, *size, channel)`: the pixels under the window at each place.

    Padded pixels have the value `fill`. Raises UserError if the window was made for images of another size.
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
    """Return integers `(height, width)`. Each says at how many places of the window a tap lies on this pixel."""
    under = _pixels_under(window, window.input_size)
    counts = np.bincount(under[under >= 0], minlength=math.prod(window.input_size))
    return np.asarray(counts.reshape(window.input_size))


def share_on_padding(window: Window) -> float:
    """Return the share (0 to 1) of taps that fall on the padding. At these taps, a weight is multiplied by zero."""
    return 1 - window.taps_inside / (math.prod(window.output_size) * math.prod(window.size))


# Sliding a filter.


class Step(NamedTuple):
    """One place of a sliding filter."""

    place: Place
    """Row and column in the map."""
    corner: Place
    """The pixel under the filter's first tap."""
    window: np.ndarray
    """The pixels under the filter, with the same axes as the filter."""
    product: np.ndarray
    """`window` times the filter, element by element."""
    total: float
    """The sum of `product`: the map's value at this place."""


def steps(
    image: np.ndarray, kernel: np.ndarray, *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> Iterator[Step]:
    """Yield a step for each place of the filter, row by row; raise UserError if filter and image do not fit."""
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
    """Slide a filter over an image, not mirrored, and return the map `(rows, columns)`. Nets call this a convolution.

    This is a loop over the filter's places. Raises UserError as `steps` does.
    """
    taken = list(steps(image, kernel, strides=strides, padding=padding, dilation=dilation))
    rows, columns = taken[-1].place
    return np.reshape([step.total for step in taken], (rows + 1, columns + 1))


class Product(NamedTuple):
    """A convolution as a product of two matrices."""

    windows: np.ndarray
    """An array `(place, tap)`: each row is one window. Places and taps are in row-major order, then channels."""
    filters: np.ndarray
    """An array `(tap, filter)`: each column is one filter."""
    maps: np.ndarray
    """The product, reshaped to `(rows, columns, filter)`."""


def as_product(
    image: np.ndarray, kernels: np.ndarray, *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> Product:
    """Slide several filters over an image, as one product of matrices.

    `kernels` has the shape `(height, width, filter)` if the image has no channels, and `(height, width, channel,
    filter)` if it has channels. Raises UserError if filters and image do not fit.
    """
    image, kernels = _checked_image(image), np.asarray(kernels, np.float64)
    window = _window_of_kernel(image.shape, kernels.shape[:-1], strides, padding, dilation)
    rows = windows_of(image, window).reshape(math.prod(window.output_size), -1)
    columns = kernels.reshape(rows.shape[1], kernels.shape[-1])
    return Product(rows, columns, (rows @ columns).reshape(*window.output_size, kernels.shape[-1]))


def matrix_of(
    kernel: np.ndarray, shape: Sequence[int], *, strides: PerAxis = 1, padding: Padding = "VALID", dilation: PerAxis = 1
) -> np.ndarray:
    """Return weights `(place, pixel)`. A full layer with these weights computes `slide` from a flattened image.

    A row holds the filter's weights at the pixels under the filter, and zeros elsewhere. Without padding, every row
    holds the same weights. With padding, the rows leave out the weights that lie over the padding. Pixels are ordered
    row by row, and the channels of a pixel are side by side. Raises UserError as `steps` does.
    """
    shape, kernel = _checked_shape(shape), np.asarray(kernel, np.float64)
    under = _pixels_under(_window_of_kernel(shape, kernel.shape, strides, padding, dilation), shape)
    place, tap = np.nonzero(under >= 0)
    matrix = np.zeros((len(under), math.prod(shape)))
    matrix[place, under[place, tap]] = kernel.ravel()[tap]
    return matrix


# Pooling.


class Block(NamedTuple):
    """One block of a pooling."""

    place: Place
    """Row and column in the pooled map."""
    corner: Place
    """The block's first pixel."""
    values: np.ndarray
    """The pixels `(rows, columns)` of the block. Padded pixels are left out."""
    winner: Place
    """The pixel with the largest value. If several pixels have it, the first of them in row-major order."""
    largest: float
    mean: float
    """Mean over the whole block. The zeros of the padding are included."""


def pool_blocks(
    image: np.ndarray, size: PerAxis = 2, *, strides: PerAxis | None = None, padding: Padding = "VALID"
) -> Iterator[Block]:
    """Yield the blocks of a pooling, row by row. The image must have no channels.

    By default, `strides` equal the size of a block. With smaller strides, blocks overlap. Raises UserError if a block
    does not fit into the image, or if padding could fill a whole block.
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
    """Return the largest value of each block and channel, without padding. Arguments are as for `pool_blocks`."""
    image = _checked_image(image)
    blocks = windows_of(image, _pooling_window(image.shape, size, strides, padding), -math.inf)
    return np.asarray(blocks.max(axis=(2, 3)))


def average_pool(
    image: np.ndarray, size: PerAxis = 2, *, strides: PerAxis | None = None, padding: Padding = "VALID"
) -> np.ndarray:
    """Return the mean of each block and channel, padded zeros included. Arguments are as for `pool_blocks`."""
    image = _checked_image(image)
    blocks = windows_of(image, _pooling_window(image.shape, size, strides, padding))
    return np.asarray(blocks.mean(axis=(2, 3)))


# Small shifts.


def shifted(image: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
    """Shift the image by `down` pixels downwards and `right` pixels to the right. Fill the free pixels with zeros."""
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
    """Return by how much a map changes if the image is shifted: one number per shift `(down, right)`.

    The number is the norm of the change divided by the norm of the map of the unmoved image. 0 means no change. If two
    maps of equal norm have no common nonzero pixels, the number is the square root of 2. Raises UserError if the map of
    the unmoved image is 0 everywhere, because its norm cannot be a divisor.
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
    """Return the window of a kernel on an image; raise UserError if kernel and image differ in axes or channels."""
    if len(kernel_shape) != len(shape) or kernel_shape[2:] != shape[2:]:
        raise UserError(f"a filter of shape {kernel_shape} does not slide over an image of shape {shape}")
    return window_for(shape, kernel_shape[:2], strides=strides, padding=padding, dilation=dilation)


def _pooling_window(shape: Shape, size: PerAxis, strides: PerAxis | None, padding: Padding) -> Window:
    kept, pads = window_arguments("pool", {"size": size, "strides": size if strides is None else strides}, padding)
    return pool_window((*shape[:2], 1), "block", kept["size"], kept["strides"], pads)


def _pixels_under(window: Window, shape: Shape) -> np.ndarray:
    """Return integers `(place, tap)`: the index of the tap's pixel in the flattened image, or -1 on padding."""
    numbered = np.arange(math.prod(shape)).reshape(shape)
    return windows_of(numbered, window, -1).reshape(math.prod(window.output_size), -1).astype(np.int64)


def _corner(window: Window, place: Place) -> Place:
    row, column = (
        at * stride - before for at, stride, (before, _) in zip(place, window.strides, window.padding, strict=True)
    )
    return row, column
