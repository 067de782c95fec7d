"""Windows, filters that slide, their matrices, borders, pooling and shifts, beside SciPy, JAX and closed forms."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cnnlib import ops
from cnnlib.demos.window_steps import (
    LINE_FILTERS,
    as_product,
    average_pool,
    line_filter,
    matrix_of,
    max_pool,
    pool_blocks,
    share_on_padding,
    shift_change,
    shifted,
    slide,
    steps,
    strokes,
    times_seen,
    window_for,
    windows_of,
)
from cnnlib.errors import UserError
from cnnlib.nn.equivalence import expand
from cnnlib.spec.layers import Conv
from cnnlib.spec.model import Model
from cnnlib.spec.window import pad_pairs

pytestmark = pytest.mark.once

MOVES = {"vertical": (1, 0), "horizontal": (0, 1), "diagonal": (1, 1), "antidiagonal": (1, -1)}


def line(kind, side=11):
    """A line of an orientation through the middle of an image, as long as the image."""
    (down, right), half = MOVES[kind], side // 2
    return strokes(
        (side, side), [((half - half * down, half - half * right), (half + half * down, half + half * right))]
    )


@st.composite
def slidings(draw, channels=True):
    """An image, a kernel of its axes and the arguments of a window that fits."""
    pair = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(2))  # noqa: E731
    size, taps, strides, dilation = pair(1, 7), pair(1, 3), pair(1, 3), pair(1, 2)
    padding = draw(st.sampled_from(["SAME", "VALID", draw(st.integers(0, 2)), (pair(0, 2), pair(0, 2))]))
    for n, k, d, pads in zip(size, taps, dilation, pad_pairs(padding, size, taps, strides, dilation), strict=True):
        assume((k - 1) * d + 1 <= min(n + sum(pads), 2 * n + 1))
    channel = draw(st.sampled_from([(), (1,), (3,)])) if channels else ()
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    image, kernel = generator.normal(size=(*size, *channel)), generator.normal(size=(*taps, *channel))
    return image, kernel, {"strides": strides, "padding": padding, "dilation": dilation}


# Filters.


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("kind", LINE_FILTERS)
def test_a_line_filter_answers_to_its_own_orientation_only(kind, size):
    kernel = line_filter(kind, size)
    assert not slide(np.full((9, 9), 7.0), kernel).any()  # a flat area
    at_middle = {other: slide(line(other), kernel)[5 - size // 2, 5 - size // 2] for other in LINE_FILTERS}
    assert at_middle == {other: size * (size - 1) if other == kind else 0 for other in LINE_FILTERS}
    # Nowhere, also beside a line, is the answer to another orientation as large.
    assert max(slide(line(other, 21), kernel).max() for other in LINE_FILTERS if other != kind) < size * (size - 1) / 2


def test_numbers_of_line_filters():
    assert line_filter("vertical").tolist() == [[-1, 2, -1]] * 3
    assert line_filter("horizontal").tolist() == line_filter("vertical").T.tolist()
    assert line_filter("diagonal").tolist() == [[2, -1, -1], [-1, 2, -1], [-1, -1, 2]]
    assert line_filter("antidiagonal").tolist() == line_filter("diagonal")[::-1].tolist()


def test_strokes_are_lines_of_ones_with_both_ends():
    image = strokes((4, 5), [((0, 0), (3, 3)), ((3, 4), (1, 4)), ((0, 2), (0, 2))])
    assert image.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 1, 1]]
    assert strokes((3, 3), [((0, 2), (2, 0))]).tolist() == np.eye(3)[::-1].tolist()


# Windows and maps.


@settings(max_examples=60, deadline=None)
@given(slidings())
def test_windows_are_slices_of_the_image_with_zeros_around(sliding):
    image, kernel, arguments = sliding
    window = window_for(image.shape, kernel.shape[:2], **arguments)
    found = windows_of(image, window)
    around = np.pad(image, [*window.padding, (0, 0)][: image.ndim])
    (down, right), (spread_down, spread_right) = arguments["strides"], arguments["dilation"]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel.shape, arguments["dilation"], strict=False)]
    for row, column in np.ndindex(window.output_size):
        top, left = row * down, column * right
        slices = slice(top, top + spans[0], spread_down), slice(left, left + spans[1], spread_right)
        assert np.array_equal(found[row, column], around[slices])
    # There is no room for one place more.
    assert around.shape[0] < window.output_size[0] * down + spans[0]
    assert around.shape[1] < window.output_size[1] * right + spans[1]


@settings(max_examples=40, deadline=None)
@given(slidings())
def test_loop_product_and_matrix_are_one_function(sliding):
    image, kernel, arguments = sliding
    slid = slide(image, kernel, **arguments)
    second = np.random.default_rng(1).normal(size=kernel.shape)
    product = as_product(image, np.stack([kernel, second], axis=-1), **arguments)
    np.testing.assert_allclose(product.maps[..., 0], slid, atol=1e-12)
    np.testing.assert_allclose(product.maps[..., 1], slide(image, second, **arguments), atol=1e-12)
    np.testing.assert_allclose(product.windows @ kernel.ravel(), slid.ravel(), atol=1e-12)
    matrix = matrix_of(kernel, image.shape, **arguments)
    np.testing.assert_allclose(matrix @ image.ravel(), slid.ravel(), atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(slidings())
def test_the_fast_operation_computes_the_same(sliding):
    image, kernel, arguments = sliding
    channels = (*image.shape, 1)[2]
    x, weights = image.reshape(1, *image.shape[:2], channels), kernel.reshape(*kernel.shape[:2], channels, 1)
    fast = jax.jit(functools.partial(ops.conv2d, **arguments))(np.float32(x), np.float32(weights))
    np.testing.assert_allclose(slide(image, kernel, **arguments), np.asarray(fast)[0, :, :, 0], atol=1e-4)


def test_maps_are_correlations():
    generator = np.random.default_rng(0)
    image, kernel = generator.normal(size=(8, 9)), generator.normal(size=(3, 5))
    np.testing.assert_allclose(slide(image, kernel), scipy.signal.correlate2d(image, kernel, mode="valid"), atol=1e-12)
    same = slide(image, kernel, padding="SAME")
    np.testing.assert_allclose(same, scipy.signal.correlate2d(image, kernel, mode="same"), atol=1e-12)
    channels = generator.normal(size=(8, 9, 2))
    both = slide(channels, np.stack([kernel, kernel[::-1]], axis=-1))
    apart = slide(channels[..., 0], kernel) + slide(channels[..., 1], kernel[::-1])
    np.testing.assert_allclose(both, apart, atol=1e-12)


@pytest.mark.parametrize("layer", ["3", "2:valid", "3/2:1"])
def test_the_matrix_is_the_full_layer_that_equivalence_makes(layer):
    conv = {
        "3": Conv(1, 3, use_bias=False),
        "2:valid": Conv(1, 2, padding="VALID", use_bias=False),
        "3/2:1": Conv(1, 3, 2, 1, use_bias=False),
    }[layer]
    shape, size = (5, 6, 2), int(layer[0])
    kernel = np.random.default_rng(0).normal(size=(size, size, 2))
    parameters = {"layer_0": {"kernel": jnp.asarray(kernel[..., None], jnp.float32)}}
    full = expand(Model((conv,)), parameters, shape, "full")["layer_0"]["kernel"]
    ours = matrix_of(kernel, shape, strides=conv.strides, padding=conv.padding)
    np.testing.assert_array_equal(ours.T.astype(np.float32), full)


def test_the_matrix_holds_the_filter_s_numbers_in_every_row():
    kernel = np.array([[1.0, 2], [3, 4]])
    matrix = matrix_of(kernel, (3, 3))
    assert matrix.tolist() == [
        [1, 2, 0, 3, 4, 0, 0, 0, 0],
        [0, 1, 2, 0, 3, 4, 0, 0, 0],
        [0, 0, 0, 1, 2, 0, 3, 4, 0],
        [0, 0, 0, 0, 1, 2, 0, 3, 4],
    ]
    padded = matrix_of(kernel, (3, 3), padding="SAME")  # of taps on the padding no weight is left
    assert padded.shape == (9, 9) and np.count_nonzero(padded) == window_for((3, 3), 2, padding="SAME").taps_inside


def test_steps_are_told_one_by_one():
    image, kernel = np.array([[3.0, 0, 1], [0, 2, 1], [4, 0, 5]]), np.array([[1.0, -1], [-2, 2]])
    first, second, third, last = steps(image, kernel)
    assert first.window.tolist() == [[3, 0], [0, 2]] and first.product.tolist() == [[3, 0], [0, 4]]
    assert first.total == 7 and first.place == first.corner == (0, 0)
    assert (second.place, third.place, last.place) == ((0, 1), (1, 0), (1, 1))
    assert [step.total for step in (second, third, last)] == [-3, -10, 11]
    padded = list(steps(image, kernel, strides=2, padding=1))
    assert [step.corner for step in padded] == [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert padded[0].window.tolist() == [[0, 0], [0, 3]]


# Sizes and borders.


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 4))
def test_sizes_follow_the_formula(n, k, stride, zeros):
    assume(k <= min(n + 2 * zeros, 2 * n + 1))
    side = window_for((n, n), k, strides=stride, padding=zeros).output_size[0]
    assert side == (n + 2 * zeros - k) // stride + 1 == len(range(-zeros, n + zeros - k + 1, stride))
    if zeros == 0 and stride == 1:
        assert side == n - k + 1
    assert window_for((n, n), k, strides=stride, padding="SAME").output_size[0] == math.ceil(n / stride)


@settings(max_examples=40, deadline=None)
@given(slidings(channels=False))
def test_pixels_are_seen_as_often_as_windows_hold_them(sliding):
    image, kernel, arguments = sliding
    window = window_for(image.shape, kernel.shape, **arguments)
    seen = times_seen(window)
    # Every tap gives 1 to the pixel under it: what the windows of an image with one bright pixel sum to.
    for place in np.ndindex(image.shape):
        lone = np.zeros(image.shape)
        lone[place] = 1
        assert seen[place] == windows_of(lone, window).sum()
    taps = math.prod(window.output_size) * kernel.size
    outside = (windows_of(np.ones(image.shape), window) == 0).sum()
    assert share_on_padding(window) == pytest.approx(outside / taps)


def test_the_border_is_seen_less():
    one_axis = np.array([1, 2, 3, 3, 3, 2, 1])
    assert np.array_equal(times_seen(window_for((7, 7), 3)), np.outer(one_axis, one_axis))
    one_axis = np.array([2, 3, 3, 3, 3, 3, 2])
    same = window_for((7, 7), 3, padding="SAME")
    assert np.array_equal(times_seen(same), np.outer(one_axis, one_axis))
    assert share_on_padding(same) == pytest.approx(1 - (19 / 21) ** 2) and share_on_padding(window_for((7, 7), 3)) == 0
    assert times_seen(window_for((5, 5), 2, strides=2)).tolist() == [[1, 1, 1, 1, 0]] * 4 + [[0] * 5]


# Pooling.


@st.composite
def poolings(draw):
    """An image with a last axis of one channel, and the arguments of a pooling that fits."""
    shape, size = (tuple(draw(st.integers(*ends)) for _ in range(2)) for ends in ((3, 8), (1, 3)))
    padding = draw(st.sampled_from(["VALID", "SAME", draw(st.integers(0, min(size) - 1))]))
    # Below the zeros of the padding, which must not win all the same.
    image = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape) - 2
    return image, size, {"strides": draw(st.sampled_from([None, 1, 2, 3])), "padding": padding}


@settings(max_examples=40, deadline=None)
@given(poolings())
def test_a_pooled_map_is_what_its_blocks_say(pooling):
    image, size, arguments = pooling
    largest, mean = max_pool(image, size, **arguments), average_pool(image, size, **arguments)
    places = [block.place for block in pool_blocks(image, size, **arguments)]
    assert places == list(np.ndindex(largest.shape)) == list(np.ndindex(mean.shape))
    for block in pool_blocks(image, size, **arguments):
        assert largest[block.place] == block.largest == image[block.winner] == block.values.max()
        assert mean[block.place] == pytest.approx(block.mean)
        for at, first, side in zip(block.winner, block.corner, size, strict=True):
            assert first <= at < first + side


@settings(max_examples=8, deadline=None)
@given(poolings())
def test_the_fast_operation_pools_the_same(pooling):
    image, size, arguments = pooling
    x = jnp.asarray(image[None, :, :, None], jnp.float32)
    strides, padding = arguments["strides"], arguments["padding"]
    largest, averages = jax.jit(
        lambda x: [pool(x, size, strides, padding)[0, :, :, 0] for pool in (ops.max_pool, ops.avg_pool)]
    )(x)
    np.testing.assert_allclose(max_pool(image, size, **arguments), largest, rtol=1e-6)
    np.testing.assert_allclose(average_pool(image, size, **arguments), averages, rtol=1e-5)


def test_blocks_side_by_side_and_overlapping():
    image = np.array([[1.0, 5, 2, 2], [3, 4, 2, 2], [0, 9, 8, 1], [0, 0, 1, 7]])
    assert max_pool(image).tolist() == [[5, 2], [9, 8]] and average_pool(image).tolist() == [[3.25, 2], [2.25, 4.25]]
    assert [block.winner for block in pool_blocks(image)] == [(0, 1), (0, 2), (2, 1), (2, 2)]  # of equal ones the first
    overlapping = list(pool_blocks(image, 3, strides=1))
    assert [block.winner for block in overlapping] == [(2, 1)] * 4
    assert max_pool(image, 3, strides=1).tolist() == [[9, 9], [9, 9]]


def test_each_channel_is_pooled_by_itself():
    image = np.array([[1.0, 5], [3, 4]])
    two = np.stack([image, -image], axis=-1)
    assert max_pool(two).tolist() == [[[5, -1]]] and average_pool(two).tolist() == [[[3.25, -3.25]]]


# Shifts.


@settings(max_examples=40, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9))
def test_a_shift_moves_every_pixel_and_brings_zeros(down, right):
    image = np.random.default_rng(0).normal(size=(5, 7, 2))
    moved = shifted(image, down, right)
    for row, column in np.ndindex(5, 7):
        inside = 0 <= row - down < 5 and 0 <= column - right < 7
        assert np.array_equal(moved[row, column], image[row - down, column - right] if inside else [0, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(-3, 3), st.integers(-3, 3), st.sampled_from(["SAME", "VALID"]))
def test_a_convolution_moves_along_with_its_image_away_from_the_border(down, right, padding):
    generator = np.random.default_rng(2)
    image, kernel = generator.normal(size=(12, 12)), generator.normal(size=(3, 3))
    moved_before = slide(shifted(image, down, right), kernel, padding=padding)
    moved_after = shifted(slide(image, kernel, padding=padding), down, right)
    inside = slice(4, -4)
    np.testing.assert_array_equal(moved_before[inside, inside], moved_after[inside, inside])
    if down or right:  # at the border they differ: what comes in is zeros of the image, or zeros of the map
        assert not np.allclose(moved_before, moved_after)


def test_the_change_is_relative_to_the_map():
    image = np.pad(np.eye(2), 3)
    ways = [(0, 0), (0, 1), (1, 1), (3, 0)]
    # Of two pixels none stays, or one does: four differences of 1, or two, over the root of 2.
    np.testing.assert_allclose(shift_change(lambda x: x, image, ways), [0, math.sqrt(2), 1, math.sqrt(2)])
    np.testing.assert_allclose(shift_change(lambda x: 5 * x, image, ways), shift_change(lambda x: x, image, ways))
    assert shift_change(np.sum, image, ways).tolist() == [0, 0, 0, 0]  # what does not tell places apart


def test_pooling_forgets_shifts_inside_a_block_and_moves_by_blocks():
    lone = np.zeros((8, 8))
    lone[2, 2] = 1
    pool = lambda image: max_pool(image, 2)  # noqa: E731
    np.testing.assert_allclose(shift_change(pool, lone, [(0, 1), (1, 1), (0, 2)]), [0, 0, math.sqrt(2)])
    assert np.array_equal(pool(shifted(lone, 0, 2)), shifted(pool(lone), 0, 1))
    # One pixel of each block does not: the lone one is lost, all of it.
    assert shift_change(lambda image: image[::2, ::2], lone, [(0, 1)]).tolist() == [1]


# Mistakes.


@pytest.mark.parametrize(
    "call, told",
    [
        (
            lambda: line_filter("round"),
            "no line filter 'round'; there are: vertical, horizontal, diagonal, antidiagonal",
        ),
        (lambda: line_filter("vertical", 4), "an odd size from 3 on, not 4"),
        (lambda: line_filter("vertical", 1), "an odd size from 3 on, not 1"),
        (lambda: strokes((4, 4), [((0, 0), (0, 4))]), r"the line from \(0, 0\) to \(0, 4\) leaves the image of 4x4"),
        (lambda: window_for((4, 4), 5), "window spans 5, its map has only 4"),
        (lambda: window_for((4, 4), 0), "size must be in 1..1,000,000, not 0"),
        (lambda: window_for((4, 4), 2, strides=0), "strides must be in 1..1,000,000, not 0"),
        (
            lambda: window_for((4, 4), 2, padding="FULL"),
            "padding must be SAME, VALID, a whole number, or a number or a pair per axis, not 'FULL'",
        ),
        (lambda: window_for((4,), 2), r"an image is \(height, width\) or .* not \(4,\)"),
        (lambda: window_for((4, 4), (2, 2, 2)), "window 2x2x2 has 3 axes"),
        (lambda: windows_of(np.ones((4, 4)), window_for((5, 4), 2)), "for images of 5x4, not of 4x4"),
        (lambda: slide(np.ones(4), np.ones(2)), "an image is"),
        (lambda: slide(np.ones((0, 4)), np.ones((2, 2))), "none of them 0"),
        (lambda: slide(np.ones((4, 4)), np.ones((2, 2, 1))), r"\(2, 2, 1\) does not slide over an image of .*\(4, 4\)"),
        (lambda: slide(np.ones((4, 4, 3)), np.ones((2, 2, 2))), "does not slide over"),
        (lambda: as_product(np.ones((4, 4)), np.ones((2, 2))), "does not slide over"),
        (lambda: matrix_of(np.ones((2, 2)), (4, 4, 3)), "does not slide over"),
        (lambda: pool_blocks(np.ones((4, 4, 1))), "one channel"),
        (lambda: max_pool(np.ones((4, 4)), 5), "block spans 5"),
        (lambda: max_pool(np.ones((4, 4)), 2, padding=2), "padding of 2: it must be less than the window"),
        (lambda: average_pool(np.ones((4, 4)), 2, strides=0), "strides must be in"),
        (lambda: shift_change(lambda x: 0 * x, np.ones((4, 4)), [(0, 1)]), "the map is 0 everywhere"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(call, told):
    with pytest.raises(UserError, match=told) as raised:
        list(call())
    assert "\n" not in str(raised.value)
