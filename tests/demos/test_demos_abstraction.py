"""Pictures of what is inside nets, by what is drawn in them; the nets are small and hardly trained."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, Split, load
from cnnlib.demos import DEMOS
from cnnlib.demos import abstraction as demos
from cnnlib.demos.demo import write
from cnnlib.interpret.activations import activations, receptive_field
from cnnlib.interpret.evidence import class_evidence
from cnnlib.interpret.patches import first_filters, strongest_patches
from cnnlib.interpret.probes import linear_probes, ridge
from cnnlib.interpret.trained import Net
from cnnlib.interpret.tuning import orientation_tuning
from cnnlib.nn.equivalence import parameter_shapes
from cnnlib.report.style import STYLE, pyplot_for_files
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.stats.intervals import mean_interval

pytestmark = pytest.mark.once

NAMES = ("learned_filters", "feature_maps", "patches", "evidence", "probes", "tuning")


@pytest.fixture(scope="module")
def data():
    """A part of the digits, of every class."""
    whole = load(Data("mnist5k", validation=500))
    parts = [Split(*(values[::5] for values in split)) for split in (whole.train, whole.validation, whole.test)]
    return DataSet(whole.description, *parts, whole.mean, whole.deviation)


@pytest.fixture
def nets(data, monkeypatch):
    """Nets whose last layer alone is fitted take the place of trained ones: what is drawn must follow from them."""

    def fitted(name, seed):
        model, draws = ARCHITECTURES.get(name).with_num_classes(10), np.random.RandomState(seed)
        parameters = {
            path: {
                part: (draws.normal(size=like.shape) / np.sqrt(np.prod(like.shape[:-1]))).astype(np.float32)
                for part, like in entry.items()
            }
            for path, entry in parameter_shapes(model, (28, 28, 1)).items()
        }
        net = Net(model, parameters, {}, (28, 28, 1), data.mean, data.deviation, 0.1 + seed / 100)
        last = len(model.layers) - 1
        (hidden,) = activations(net, data.train.x, (last - 1,))
        ((_, scores),) = ridge(hidden.astype(np.float64), np.eye(10)[data.train.y], (1e-3,))
        weights = parameters[f"layer_{last}"]
        weights["bias"] = scores(np.zeros((1, hidden.shape[1])))[0].astype(np.float32)
        weights["kernel"] = scores(np.eye(hidden.shape[1])).astype(np.float32) - weights["bias"]
        return net

    made = {name: [fitted(name, seed) for seed in range(5)] for name in demos.BOTH}
    asked = []

    def trained(names, seeds=1, name="mnist5k", epochs=3):
        asked.append((names, seeds, name, epochs))
        return {arm: made[arm][:seeds] for arm in names}, data

    monkeypatch.setattr(demos, "trained", trained)
    pyplot, _ = pyplot_for_files()
    yield made, asked
    pyplot.close("all")


def test_every_tile_of_a_mosaic_is_in_its_place():
    tiles = np.arange(5 * 2 * 3).reshape(5, 2, 3).astype(float)
    whole = demos.mosaic(tiles, 2)
    assert whole.shape == (3 * 2 + 2, 2 * 3 + 1)
    np.testing.assert_array_equal(whole[3:5, 4:7], tiles[3])
    assert np.isnan(whole[2]).all() and np.isnan(whole[:, 3]).all() and np.isnan(whole[6:, 4:]).all()


def test_filters_of_both_nets_are_drawn_on_scales_that_are_white_at_zero(nets):
    left, right = (axes for axes in DEMOS.get("learned_filters").draw().axes if axes.images)
    for panel, name, tile, place in (
        (left, "lenet5", 5, np.s_[12:17, 6:11]),
        (right, "lenet_300_100", 11, np.s_[64:92, 96:124]),
    ):
        image = panel.images[0]
        np.testing.assert_allclose(image.get_array()[place], first_filters(nets[0][name][0])[tile, ..., 0])
        low, high = image.get_clim()
        assert -low == high == pytest.approx(np.abs(image.get_array()).max())
    assert left.get_title() == "LeNet-5: all 6 filters, 5x5"
    assert right.get_title() == "LeNet-300-100: 12 of 300 filters, 28x28"


def test_the_frame_on_the_digit_is_what_the_framed_unit_sees(nets, data):
    figure = DEMOS.get("feature_maps").draw()
    digit = next(axes for axes in figure.axes if "fields" in axes.get_title())
    first, second, hidden = (axes for axes in figure.axes if "ReLU" in axes.get_title())
    net, example = nets[0]["lenet5"][0], int(np.argmax(data.test.y == demos.SHOWN))
    image = data.test.x[example : example + 1]
    np.testing.assert_array_equal(digit.images[0].get_array(), image[0, ..., 0])
    outputs = activations(net, image)
    for panel, layer, frame in ((first, 1, digit.patches[0]), (second, 4, digit.patches[1])):
        maps = outputs[layer][0]
        row, column, _ = np.unravel_index(maps.argmax(), maps.shape)
        seen = receptive_field(net, layer, (int(row), int(column)))
        assert (frame.get_x(), frame.get_y()) == (seen.left - 0.5, seen.top - 0.5)
        assert (frame.get_width(), frame.get_height()) == (seen.right - seen.left, seen.bottom - seen.top)
        assert frame.get_edgecolor() == panel.patches[0].get_edgecolor()
        x, y = (int(at + 0.5) for at in panel.patches[0].get_xy())
        assert panel.images[0].get_array()[y, x] == pytest.approx(maps.max())
    np.testing.assert_array_equal(hidden.images[0].get_array(), outputs[9])
    bars = next(axes for axes in figure.axes if axes.get_xlabel() == "class")
    np.testing.assert_allclose([bar.get_height() for bar in bars.patches], outputs[-1][0], rtol=1e-5)


def test_a_row_of_patches_is_a_unit_s(nets, data):
    first, second, third = DEMOS.get("patches").draw().axes
    for panel, layer, unit, row, size, gap in (
        (first, 1, 4, 4, 5, 1),
        (second, 4, 2, 2, 14, 2),
        (third, 4, 15, 7, 14, 2),
    ):
        found = strongest_patches(nets[0]["lenet5"][0], data.test.x, layer, demos.PATCHES)
        drawn = panel.images[0].get_array()[row * (size + gap) :][:size]
        for place in range(demos.PATCHES):
            tile = drawn[:, place * (size + gap) :][:, :size]
            np.testing.assert_array_equal(tile, found.pixels[unit, place, ..., 0])
        classes = len(set(data.test.y[found.examples[unit]].tolist()))
        assert panel.get_yticklabels()[row].get_text() == f"unit {unit} ({classes})"
        assert panel.get_yticks()[row] == row * (size + gap) + (size - 1) / 2


def test_evidence_is_that_for_the_class_in_the_title_and_a_mistake_is_shown(nets, data):
    panels = np.array(DEMOS.get("evidence").draw().axes).reshape(3, -1)
    conv, full = (nets[0][name][0] for name in demos.BOTH)
    wrong = int(np.flatnonzero(activations(conv, data.test.x)[-1].argmax(axis=1) != data.test.y)[0])
    image, labels = data.test.x[wrong], []
    for column in panels.T[-2:]:
        np.testing.assert_array_equal(column[0].images[0].get_array(), image[..., 0])
        assert column[0].get_title().startswith(f"a {data.test.y[wrong]}: conv says")
        label = int(column[1].get_title().removeprefix("for "))
        np.testing.assert_array_equal(column[1].images[0].get_array(), class_evidence(conv, image, label))
        signed = column[2].images[0]
        np.testing.assert_array_equal(signed.get_array(), class_evidence(full, image, label))
        assert signed.get_clim()[0] == -signed.get_clim()[1]
        labels.append(label)
    assert labels[1] == data.test.y[wrong] != labels[0]
    for column in panels.T[:-2]:
        label = int(column[1].get_title().removeprefix("for "))
        assert column[0].get_title() == f"a {label}: conv says {label},\nfull {label}"
        (example,) = (at for at, x in enumerate(data.test.x) if (x[..., 0] == column[0].images[0].get_array()).all())
        assert data.test.y[example] == label
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["test digit", "conv: Grad-CAM", "full: gradient x input"]


def test_probes_have_the_mean_and_interval_of_every_seed(nets, data):
    figure = DEMOS.get("probes").draw()
    assert nets[1] == [(demos.BOTH, 5, "mnist5k", 2)]
    for panel, name, reading, layers in zip(
        figure.axes, demos.BOTH, ("conv", "full"), ((2, 5, 7, 9, 10), (1, 3, 4)), strict=True
    ):
        assert demos.steps(nets[0][name][0].model) == list(layers)
        found = [linear_probes(net, data, (None, *layers)) for net in nets[0][name]]
        accuracies = 100 * np.array([[probe.accuracy for probe in lane] for lane in found])
        (container,) = panel.containers
        line, _, (bars,) = container.lines
        np.testing.assert_allclose(line.get_ydata(), accuracies.mean(axis=0))
        assert line.get_color() == STYLE[reading][0] and line.get_marker() == STYLE[reading][1]
        ends = np.array(bars.get_segments())[..., 1]
        for place, values in enumerate(accuracies[:, 1:].T, 1):
            np.testing.assert_allclose(ends[place], mean_interval(values)[1:3])
        dots = next(other for other in panel.lines if other.get_label() == "each of n = 5 seeds")
        np.testing.assert_allclose(dots.get_ydata(), accuracies[:, 1:].T.ravel())
        ticks = [label.get_text() for label in panel.get_xticklabels()]
        assert ticks[0] == "pixels\n784" and ticks[-1] == "dense:10\n10" and len(ticks) == 1 + len(layers)
    assert "mean 12.0 %" in figure.axes[0].get_legend().get_texts()[1].get_text()
    assert figure.axes[0].get_ylabel() == "test accuracy of the probe, % of 200"


def test_tuning_curves_close_and_every_unit_is_a_point(nets):
    figure = DEMOS.get("tuning").draw()
    assert nets[1] == [(("lenet5",), 3, "lines", 3)]
    tuned = [orientation_tuning(net, demos.ANGLES) for net in nets[0]["lenet5"][:3]]
    polar = [axes for axes in figure.axes if axes.name == "polar"]
    for unit, axes in enumerate(polar):
        angles, responses = axes.lines[0].get_data()
        np.testing.assert_allclose(responses[:24], tuned[0].responses[unit])
        np.testing.assert_allclose(np.rad2deg(angles[[0, 6, 24, 48]]), [0, 45, 180, 0])
        np.testing.assert_allclose(responses[24:48], responses[:24])
        assert axes.get_title() == f"selectivity {tuned[0].selectivity[unit]:.2f}"
    scatter = next(axes for axes in figure.axes if axes.get_ylabel() == "selectivity")
    points = [line for line in scatter.lines if line.get_label().startswith("seed")]
    for line, found in zip(points, tuned, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), found.preferred)
        np.testing.assert_array_equal(line.get_ydata(), found.selectivity)
    mean = np.mean([found.selectivity for found in tuned])
    preferred = np.concatenate([found.preferred for found in tuned])
    share = np.mean([min(angle % 45, -angle % 45) <= 7.5 for angle in preferred])
    told = f"these 18 units: mean {mean:.2f}, {100 * share:.0f} % within 7.5 degrees of a class"
    assert told in [text.get_text() for text in scatter.get_legend().get_texts()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_opaque_and_its_words_are_large_enough(nets, tmp_path, name, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    sizes = []
    saved = Figure.savefig

    def kept(figure, *arguments, **options):
        sizes.extend(text.get_fontsize() for text in figure.findobj(Text) if text.get_text() and text.get_visible())
        return saved(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    path, _ = write(DEMOS.get(name), tmp_path)
    assert min(sizes) >= 8
    with Image.open(path) as image:
        assert image.width > 1000 and image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert image.convert("RGBA").getextrema()[3] == (255, 255)


@pytest.mark.slow
def test_what_the_pictures_are_said_to_show_is_so():
    nets, data = demos.trained(demos.BOTH, 5, epochs=2)
    conv, full = (np.mean([net.test_accuracy for net in nets[name]]) for name in demos.BOTH)
    assert conv > full + 0.015 and full > 0.9
    (pixels,) = linear_probes(nets["lenet5"][0], data, (None,))
    pooled = [linear_probes(net, data, (2, 5)) for net in nets["lenet5"]]
    hidden = [linear_probes(net, data, (1, 4)) for net in nets["lenet_300_100"]]
    first, second = np.array([[probe.accuracy for probe in lane] for lane in pooled]).mean(axis=0)
    of_full, last = np.array([[probe.accuracy for probe in lane] for lane in hidden]).mean(axis=0)
    assert abs(first - of_full) < 0.02 < 0.05 < min(first, of_full) - pixels.accuracy
    assert second > first + 0.01 > of_full + 0.01 and last < of_full + 0.002

    lines, _ = demos.trained(("lenet5",), 3, "lines")
    tuned = [orientation_tuning(net, demos.ANGLES) for net in lines["lenet5"]]
    preferred = np.concatenate([found.preferred for found in tuned])
    random = orientation_tuning(demos.random_filters((5, 5)), demos.ANGLES)
    assert demos.along_a_class(preferred).mean() > 0.7 > 0.6 > demos.along_a_class(random.preferred).mean()
    assert np.nanmean([found.selectivity for found in tuned]) > np.nanmean(random.selectivity) + 0.03
