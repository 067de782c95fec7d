"""Pictures of windows, padding and pooling, by what is drawn in them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from PIL import Image

from cnnlib.demos import DEMOS, window_steps
from cnnlib.demos.demo import write
from cnnlib.demos.pooling import DIRECTIONS, MOST_SHIFT, maps_of, some_digits
from cnnlib.demos.windows import FILTERS, IMAGE, KERNEL, PHASES, POOLED, REST
from cnnlib.report.style import pyplot_for_files

pytestmark = pytest.mark.once


@pytest.fixture
def pyplot():
    made, _ = pyplot_for_files()
    yield made
    made.close("all")


def drawn(animation):
    """The figure of an animation, whose frames are looked at one by one."""
    animation._draw_was_started = True  # matplotlib would warn
    return animation._fig


def written(panel):
    """The numbers in a panel's cells, row by row; what is empty is not a number."""
    shape = panel.images[0].get_array().shape
    cells = [text.get_text() for text in panel.texts]
    return np.reshape([float(text) if text else np.nan for text in cells], shape)


def frame_of(panel):
    """The row and column that the frame begins with, and its height and width, in cells."""
    (frame,) = panel.patches
    return frame.get_y() + 0.5, frame.get_x() + 0.5, frame.get_height(), frame.get_width()


def titled(figure, start):
    (panel,) = (axes for axes in figure.axes if axes.get_title().startswith(start))
    return panel


def test_each_line_filter_has_its_map_below(pyplot):
    figure = DEMOS.get("filters").draw()
    house = titled(figure, "image").images[0].get_array()
    kernels = [axes for axes in figure.axes if axes.get_title().endswith(" filter")]
    maps = [axes for axes in figure.axes if axes.get_title().startswith("its map")]
    assert [axes.get_title().split()[0] for axes in kernels] == list(window_steps.LINE_FILTERS)
    for above, below in zip(kernels, maps, strict=True):
        expected = scipy.signal.correlate2d(house, written(above), mode="valid")
        np.testing.assert_array_equal(below.images[0].get_array(), expected)
        assert below.images[0].get_clim() == maps[0].images[0].get_clim() and expected.max() == 6
        assert above.get_position().x0 >= below.get_position().x0 and above.get_position().y0 > below.get_position().y0
    # Zero is white in a filter, neither colour.
    low, high = kernels[0].images[0].get_clim()
    assert low == -high


def test_the_filter_goes_over_the_image_number_by_number(pyplot):
    animation = DEMOS.get("steps").draw()
    image, kernel, product, sums = drawn(animation).axes
    (told,) = animation._fig.texts
    expected = scipy.signal.correlate2d(IMAGE, KERNEL, mode="valid")
    assert animation._save_count == PHASES * expected.size + REST
    for index, (row, column) in enumerate(np.ndindex(expected.shape)):
        window = IMAGE[row : row + 2, column : column + 2]
        for phase in range(PHASES):
            animation._func(PHASES * index + phase)
            assert np.array_equal(written(image), IMAGE) and np.array_equal(written(kernel), KERNEL)
            assert frame_of(image) == (row, column, 2, 2) and frame_of(sums) == (row, column, 1, 1)
            assert np.array_equal(written(product), np.full((2, 2), np.nan) if phase == 0 else window * KERNEL, True)
            known = np.where(np.arange(9).reshape(3, 3) < index + (phase == 2), expected, np.nan)
            assert np.array_equal(written(sums), known, equal_nan=True)
            assert bool(told.get_text()) == (phase > 0)
        terms, total = told.get_text().split(" = ")
        assert "· -" not in terms  # negative numbers are in parentheses
        assert {text.get_text() for text in product.texts} <= {"-3", "-2", "-1", "0", "1", "2", "3"}  # no -0, no 3.0
        assert eval(terms.replace("·", "*")) == float(total) == expected[row, column]
    animation._func(animation._save_count - 1)
    assert np.array_equal(written(sums), expected)


def test_numbers_can_be_read_on_their_colour(pyplot):
    for name in ("steps", "pooling"):
        animation = DEMOS.get(name).draw()
        animation._func(10**6)
        for panel in drawn(animation).axes:
            colors = panel.images[0].to_rgba(panel.images[0].get_array()).reshape(-1, 4)
            for text, color in zip(panel.texts, colors, strict=True):
                assert text.get_fontsize() >= 8
                # Relative luminance and contrast as WCAG 2 defines them; black or white, the better has 4.58 or more.
                linear = np.where(color[:3] <= 0.04045, color[:3] / 12.92, ((color[:3] + 0.055) / 1.055) ** 2.4)
                ground, ink = linear @ (0.2126, 0.7152, 0.0722), {"black": 0.0, "white": 1.0}[text.get_color()]
                assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 4


def test_windows_times_filters_are_the_maps(pyplot):
    figure = DEMOS.get("product").draw()
    left, filters, right = (written(titled(figure, start)) for start in ("9 windows", "2 filters", "2 maps"))
    assert np.array_equal(left @ filters, right)
    for index in range(2):
        expected = scipy.signal.correlate2d(IMAGE, FILTERS[..., index], mode="valid")
        (folded,) = (a for a in figure.axes if a.get_title() == f"map {index + 1}" and written(a).shape == (3, 3))
        assert np.array_equal(written(folded), expected) and np.array_equal(right[:, index], expected.ravel())


def test_the_full_layer_s_weights_are_coloured_by_what_they_share(pyplot):
    figure = DEMOS.get("product").draw()
    panel, kernel = titled(figure, "weights"), titled(figure, "filter")
    weights, shades = written(panel), np.asarray(panel.images[0].get_array())
    flat, result = (written(axes) for axes in figure.axes if axes.images[0].get_array().shape[1] == 1)
    assert np.array_equal(weights @ flat, result) and np.array_equal(flat.ravel(), IMAGE.ravel())
    by_shade = dict(zip(np.asarray(kernel.images[0].get_array()).ravel(), written(kernel).ravel(), strict=True))
    assert len(by_shade) == KERNEL.size and 0 not in by_shade
    for shade, weight in by_shade.items():
        assert ((shades == shade).sum(axis=1) == 1).all() and (weights[shades == shade] == weight).all()
    assert not weights[shades == 0].any()
    figure.draw_without_rendering()  # shrinks panels that do not have their grid's proportions
    # Cells are of one size, whatever the grid: so what is multiplied can be followed.
    sizes = {round(axes.get_window_extent().width / axes.images[0].get_array().shape[1], 3) for axes in figure.axes}
    assert len(sizes) == 1
    counts = dict(zip(("all", "zero", "shared"), (144, 108, 36), strict=True))
    assert (weights.size, (weights == 0).sum(), (weights != 0).sum()) == tuple(counts.values())
    assert all(re.search(rf"\b{count}\b", DEMOS.get("product").look) for count in counts.values())


def test_pooling_goes_on_with_the_largest_of_each_block(pyplot):
    animation = DEMOS.get("pooling").draw()
    panels = drawn(animation).axes
    for (image, pooled), size in zip((panels[:2], panels[2:]), (2, 3), strict=True):
        side = 6 if size == 2 else 7
        pixels, places = POOLED[:side, :side], list(np.ndindex(3, 3))
        blocks = [pixels[2 * row : 2 * row + size, 2 * column : 2 * column + size] for row, column in places]
        for index, (row, column) in enumerate(places):
            animation._func(index)
            assert frame_of(image) == (2 * row, 2 * column, size, size) and frame_of(pooled) == (row, column, 1, 1)
            known = [block.max() if at <= index else np.nan for at, block in enumerate(blocks)]
            assert np.array_equal(written(pooled).ravel(), known, equal_nan=True)
            at_column, at_row = (int(ends[-1]) for ends in image.lines[0].get_data())
            assert 0 <= at_row - 2 * row < size and 0 <= at_column - 2 * column < size
            assert (
                written(image)[at_row, at_column] == blocks[index].max()
                and len(image.lines[0].get_xdata()) == index + 1
            )
            assert image.get_xlabel() == f"largest {blocks[index].max():g}, mean {blocks[index].mean():.2f}"
    assert (written(panels[3]) == 9).sum() == 4  # the overlap of four blocks, as the demo says


def test_padding_keeps_the_size_and_the_border(pyplot):
    figure = DEMOS.get("padding").draw()
    image = np.asarray(titled(figure, "image").images[0].get_array())
    plain, padded = (titled(figure, f"map, {words}").images[0] for words in ("without", "zeros"))
    kernel = window_steps.line_filter("vertical")
    np.testing.assert_array_equal(plain.get_array(), scipy.signal.correlate2d(image, kernel, mode="valid"))
    np.testing.assert_array_equal(padded.get_array(), scipy.signal.correlate2d(image, kernel, mode="same"))
    assert "12 - 3 + 1 = 10" in titled(figure, "map, without").get_title()
    assert "12 + 2 - 3 + 1 = 12" in titled(figure, "map, zeros").get_title()
    # Each number is drawn over the pixel in the middle of its window.
    assert tuple(plain.get_extent()) == (0.5, 10.5, 10.5, 0.5) and tuple(padded.get_extent()) == (
        -0.5,
        11.5,
        11.5,
        -0.5,
    )
    assert plain.get_array()[4, 0] == -3 and padded.get_array()[5, 0] == padded.get_array()[5, 6] == 6
    for words, ends in (("without padding", ["1", "3", "9"]), ("zeros around", ["4", "6", "9"])):
        panel = titled(figure, f"windows over a pixel, {words}")
        counts = panel.images[0].get_array()
        assert [text.get_text() for text in panel.texts] == ends
        assert all(
            str(counts[int(y), int(x)]) == text
            for (x, y), text in ((t.get_position(), t.get_text()) for t in panel.texts)
        )
    assert "0.0 %" in titled(figure, "windows over a pixel, without").get_title()
    assert f"{100 * (1 - (34 / 36) ** 2):.1f} %" in titled(figure, "windows over a pixel, zeros").get_title()


def test_sides_shrink_by_layers_without_padding(pyplot):
    panel = titled(DEMOS.get("padding").draw(), "28x28")
    sides = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
    assert sides == {
        "any, zeros around": [28] * 14,
        "3x3": [28 - 2 * layer for layer in range(14)],
        "5x5": [28 - 4 * layer for layer in range(7)],
    }
    assert panel.get_xlabel() == "layers" and "pixels" in panel.get_ylabel()


@pytest.mark.slow
def test_pooling_takes_the_edge_off_small_shifts(pyplot):
    demo = DEMOS.get("shifts")
    figure = demo.draw()
    curves = {line.get_label(): line.get_ydata() for panel in figure.axes for line in panel.lines}
    for kind in ("max", "average"):
        small, large = (curves[f"{kind} of {size}"] for size in ("2x2", "4x4"))
        assert (large[1:] < small[1:]).all() and (small[1:] < curves["map, before pooling"][1:]).all()
    for size in ("2x2", "4x4"):
        np.testing.assert_allclose(curves[f"one pixel of {size}"], curves["map, before pooling"], atol=0.02)
    assert "n = 100" in figure.get_suptitle() and "95 % interval" in figure.get_suptitle()
    first = [curves[name][1] for name in ("map, before pooling", "max of 2x2", "average of 2x2", "max of 4x4")]
    more = [curves[name][1] for name in ("average of 4x4", "one pixel of 2x2", "one pixel of 4x4")]
    second = [curves[name][2] for name in ("max of 2x2", "average of 2x2")]
    assert re.findall(r"\d\.\d\d", demo.look) == [f"{value:.2f}" for value in (*first, *more, *second)]
    for panel in figure.axes:
        assert panel.get_xlabel() == "shift, pixels" and len(panel.get_legend().get_texts()) == 5
        assert len(panel.collections) == 4  # a band a curve
    assert figure.axes[0].get_ylabel()


def test_what_is_plotted_is_the_mean_over_digits_with_its_interval(pyplot, monkeypatch):
    monkeypatch.setattr("cnnlib.demos.pooling.DIGITS", 10)
    panel = DEMOS.get("shifts").draw().axes[0]
    (at,) = (index for index, line in enumerate(panel.lines) if line.get_label() == "one pixel of 2x2")
    changes = []
    for digit in some_digits(10):
        still = maps_of(digit)
        # The map moves along, and zeros are all around.
        moved = [np.roll(still, (2 * down, 2 * right), axis=(0, 1)) for down, right in DIRECTIONS]
        lost = [np.linalg.norm((other - still)[::2, ::2]) / np.linalg.norm(still[::2, ::2]) for other in moved]
        changes.append(np.mean(lost))
    assert panel.lines[at].get_ydata()[2] == pytest.approx(np.mean(changes), rel=1e-12)
    band = panel.collections[at].get_paths()[0].vertices
    ends = scipy.stats.t.interval(0.95, 9, np.mean(changes), scipy.stats.sem(changes))
    assert sorted(band[band[:, 0] == 2, 1]) == pytest.approx(ends)


def test_maps_of_moved_digits_are_moved_maps():
    for digit in some_digits(10):
        for down, right in DIRECTIONS:
            by = MOST_SHIFT * down, MOST_SHIFT * right
            np.testing.assert_array_equal(
                maps_of(window_steps.shifted(digit, *by)), window_steps.shifted(maps_of(digit), *by)
            )


@pytest.mark.parametrize("name, width", [("filters", 1000), ("product", 900), ("padding", 1000)])
def test_a_picture_is_written(tmp_path, name, width):
    path, _ = write(DEMOS.get(name), tmp_path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert pixels.shape[1] > width and (pixels[..., 3] == 255).all() and (pixels[0, 0] == 255).all()


def test_an_animation_leaves_time_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnlib.demos.windows.IMAGE", IMAGE[:2, :3])
    path, _ = write(DEMOS.get("steps"), tmp_path)
    with Image.open(path) as image:
        assert image.n_frames == 2 * PHASES  # of two places; the rest repeats the last
        durations = []
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
    assert durations == [400] * (2 * PHASES - 1) + [400 * (1 + REST)]
