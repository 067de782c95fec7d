"""Draw what trained nets contain: filters, maps, strongest patches, evidence for a class, probes, orientations."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from cnnlib.config.schema import Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet
from cnnlib.demos.demo import DEMOS, Demo
from cnnlib.report.style import STYLE
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.spec.layers import Activation, Conv, Dense, Filter
from cnnlib.spec.model import Model
from cnnlib.stats.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


if TYPE_CHECKING:
    from cnnlib.interpret.trained import Net

FULL, CONV = STYLE["full"][0], STYLE["conv"][0]
SKY, GREY = "#56B4E9", "#999999"
SIGNED, MAPS = "RdBu_r", "cividis"
"""Colour maps: `SIGNED` for values of both signs (0 is white), `MAPS` for others. Both suit colour-blind readers."""


@DEMOS.register
def learned_filters() -> Demo:
    """What the first layers of LeNet-5 and LeNet-300-100 learn: their weights as images."""
    return Demo(
        draw_filters,
        "learned_filters.png",
        "Neither is tidy after so few examples. LeNet-5's six filters, each used at 784 places, hint at edges and "
        "strokes at best. Those of the full net are as large as the image: some hold blots of ink that is wanted "
        "(red) or not (blue) at one place, others little but noise. The rim that no digit reaches keeps the noise "
        "that it began with, moved as one: its pixels are always the same, and so are its gradients.",
    )


@DEMOS.register
def feature_maps() -> Demo:
    """One digit on its way through LeNet-5, with what one unit of each convolution sees of it."""
    return Demo(
        draw_maps,
        "feature_maps.png",
        "The maps of the first convolution still look like the digit, drawn by its edges; those of the second are "
        "coarse and mostly dark, and say where something is rather than what it looks like; dense layers have no "
        "places left. The frames on the digit are what the most excited unit of each convolution, framed as well, "
        "sees of it. Paler rims come from the zeros around the image: to the net these are grey, not black.",
    )


@DEMOS.register
def patches() -> Demo:
    """The patches of test digits that excite each unit of LeNet-5's convolutions most."""
    return Demo(
        draw_patches,
        "patches.png",
        "A row is a unit, and its patches come from six digits, of as many classes as the brackets say. In the "
        "first layer they are strokes and edges of one direction; in the second, parts of digits: bends, ends, "
        "crossings. Some units are after one class, most after a shape that several have. Those whose patches are "
        "mostly black look for where a digit ends, or for nothing that has a name.",
    )


@DEMOS.register
def evidence() -> Demo:
    """Where LeNet-5 finds evidence for a class (Grad-CAM), and where a full net does (gradient times input)."""
    return Demo(
        draw_evidence,
        "evidence.png",
        "Grad-CAM makes coarse blobs, of a map of 10x10 places, beside the strokes as often as on them: it averages"
        " a map's gradient over all places, and LeNet-5's dense layers weigh each place on its own. Gradient times "
        "input is sharp and speckled: pixels for (red) and against (blue). The last two columns are one digit that "
        "LeNet-5 gets wrong, for its answer and for the truth. Each picture has a scale of its own.",
    )


@DEMOS.register
def probes() -> Demo:
    """How well a linear classifier tells the digits apart by each layer's output, in LeNet-5 and LeNet-300-100."""
    return Demo(
        draw_probes,
        "probes.png",
        "After two epochs of training. Most of what a linear classifier gains it gains at the first step, in both "
        "nets. The second convolution adds to it once more, and what dense layers put out is no easier to tell apart "
        "linearly. The ten last outputs are less so: they are made for a softmax, and these classifiers are fitted by "
        "least squares. Bars are intervals of Student's t; the pixels are the same for all seeds.",
    )


@DEMOS.register
def tuning() -> Demo:
    """How strongly first-layer units respond to bars of each orientation, after training on lines."""
    return Demo(
        draw_tuning,
        "tuning.png",
        "Trained to tell vertical, horizontal and diagonal lines apart, most units respond best to bars along the "
        "lines of a class (dashed), of random filters no more than chance has it: a half. Above, a curve's distance "
        "from the middle is the response to a bar of that direction. A few units are very selective; on average "
        "they are hardly more so than random ones.",
    )


@functools.cache
def trained(
    names: tuple[str, ...], seeds: int = 1, data: str = "mnist5k", epochs: int = 3
) -> tuple[dict[str, list[Net]], DataSet]:
    """Train registered architectures with the optimiser of the experiment `fc_vs_conv`, but for fewer epochs."""
    from cnnlib.interpret.trained import train_models

    return train_models(
        Experiment(
            data=Data(data, validation=500),
            arms=tuple(Arm(name, ARCHITECTURES.get(name)) for name in names),
            optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.02,), weight_decay=(0.01,)),
            lanes=Lanes(seed=tuple(range(seeds))),
            epochs=epochs,
            batch_size=100,
        )
    )


BOTH = ("lenet5", "lenet_300_100")


def mosaic(tiles: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Join images `(count, height, width)` row by row into one; gaps and empty places are NaN."""
    count, height, width = tiles.shape
    rows = -(-count // columns)
    whole = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        whole[top : top + height, left : left + width] = tile
    return whole


def draw_filters() -> Figure:
    """Draw the filters of a convolution, and the filters of the first units of a full layer."""
    from matplotlib import pyplot

    from cnnlib.interpret.patches import first_filters

    nets, _ = trained(BOTH)
    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.2), width_ratios=(1, 1.7), layout="constrained")
    shown = (("lenet5", "LeNet-5", 6, 2, 1), ("lenet_300_100", "LeNet-300-100", 12, 4, 4))
    for panel, (name, title, most, columns, gap) in zip(panels, shown, strict=True):
        filters = first_filters(nets[name][0])
        count, height, width, _ = filters.shape
        tiles = mosaic(filters[:most, ..., 0], columns, gap)
        bound = float(np.nanmax(np.abs(tiles)))
        image = panel.imshow(tiles, cmap=SIGNED, vmin=-bound, vmax=bound, interpolation="nearest")
        of = "all" if most >= count else f"{most} of"
        panel.set_title(f"{title}: {of} {count} filters, {height}x{width}", fontsize=10)
        panel.axis("off")
        figure.colorbar(image, ax=panel, shrink=0.8, label="weight")
    return figure


SHOWN = 4
"""Class of the digit that is shown. The digit is the first test example of this class."""


def draw_maps() -> Figure:
    """Draw a digit, the maps of both convolutions, and the dense layers after them."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    from cnnlib.interpret.activations import activations, receptive_field
    from cnnlib.interpret.patches import strongest_patches

    nets, data = trained(("lenet5",))
    (net,) = nets["lenet5"]
    example = int(np.argmax(np.asarray(data.test.y) == SHOWN))
    image = data.test.x[example : example + 1]
    first, second, hidden = activated(net.model)
    *maps_of, vector, scores = activations(net, image, (first, second, hidden, len(net.model.layers) - 1))
    figure = pyplot.figure(figsize=(9.6, 5.2), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 2.4))
    left, right = figure.add_subfigure(grid[0, 0]), figure.add_subfigure(grid[0, 1])
    digit, bars = left.subplots(2, 1, height_ratios=(1.6, 1))
    digit.imshow(image[0, ..., 0], cmap="gray", interpolation="nearest")
    digit.set(xticks=[], yticks=[])
    panels = right.subplots(3, 1, height_ratios=(1, 1.5, 0.4))
    told = []
    shown = ((panels[0], first, 6, CONV, "first"), (panels[1], second, 8, SKY, "second"))
    for (maps,), (panel, layer, columns, color, kind) in zip(maps_of, shown, strict=True):
        found = strongest_patches(net, image, layer, 1)
        unit = int(found.values[:, 0].argmax())
        position = tuple(map(int, found.positions[unit, 0]))
        seen = receptive_field(net, layer, position)
        gap = max(1, maps.shape[0] // 8)
        drawn = panel.imshow(mosaic(np.moveaxis(maps, -1, 0), columns, gap), cmap=MAPS, interpolation="nearest")
        corner = np.array(divmod(unit, columns)) * (np.array(maps.shape[:2]) + gap) + position - 0.5
        panel.add_patch(Rectangle(corner[::-1], 1, 1, fill=False, color=color, linewidth=2))
        corner_seen = (seen.left - 0.5, seen.top - 0.5)
        sides = (seen.right - seen.left, seen.bottom - seen.top)
        digit.add_patch(Rectangle(corner_seen, *sides, fill=False, color=color, linewidth=2))
        size = "x".join(map(str, maps.shape[:2]))
        panel.set_title(f"{kind} convolution and ReLU: {maps.shape[-1]} maps of {size}", fontsize=10)
        panel.axis("off")
        right.colorbar(drawn, ax=panel, shrink=0.8)
        told.append(f"{sides[0]}x{sides[1]}")
    strip = panels[2].imshow(vector, cmap=MAPS, aspect="auto", interpolation="nearest")
    right.colorbar(strip, ax=panels[2], aspect=6)
    panels[2].set(yticks=[], xlabel="unit")
    panels[2].set_title(f"last hidden layer and ReLU: {vector.shape[1]} units", fontsize=10)
    digit.set_title(f"fields of {' and '.join(told)}", fontsize=10)
    classes = np.arange(scores.shape[1])
    bars.bar(classes, scores[0], color=np.where(classes == scores[0].argmax(), CONV, GREY))
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set(xticks=classes, xlabel="class", ylabel="logit")
    return figure


def activated(model: Model) -> list[int]:
    """Return the positions of the activation after each convolution, and of the last activation."""
    layers = list(enumerate(model.layers))
    found = [index for index, layer in layers if isinstance(layer, Activation)]
    return [*(index for index in found if isinstance(model.layers[index - 1], Conv)), found[-1]]


PATCHES = 6
"""Number of patches per unit."""


def draw_patches() -> Figure:
    """Draw a mosaic of patches for each convolution, one row per unit."""
    from matplotlib import pyplot

    from cnnlib.interpret.patches import strongest_patches

    nets, data = trained(("lenet5",))
    (net,) = nets["lenet5"]
    first, second, _ = activated(net.model)
    figure, panels = pyplot.subplots(1, 3, figsize=(9.6, 4.0), layout="constrained")
    found = {layer: strongest_patches(net, data.test.x, layer, PATCHES) for layer in (first, second)}
    half = len(found[second].values) // 2
    shown = (
        (first, range(len(found[first].values)), "first convolution"),
        (second, range(half), "second convolution"),
        (second, range(half, 2 * half), "second, continued"),
    )
    for panel, (layer, units, title) in zip(panels, shown, strict=True):
        pixels = found[layer].pixels[list(units), ..., 0]
        height, width = pixels.shape[-2:]
        gap = max(1, height // 7)
        tiles = mosaic(pixels.reshape(-1, height, width), PATCHES, gap)
        panel.imshow(tiles, cmap="gray", interpolation="nearest", vmin=0, vmax=255)
        panel.set_facecolor(SKY)  # shows between the tiles
        panel.set_title(f"{title}: {height}x{width}", fontsize=10)
        classes = [len(set(data.test.y[found[layer].examples[unit]].tolist())) for unit in units]
        labels = [f"unit {unit} ({number})" for unit, number in zip(units, classes, strict=True)]
        panel.set(xticks=[], yticks=np.arange(len(units)) * (height + gap) + (height - 1) / 2, yticklabels=labels)
        panel.tick_params(length=0, labelsize=9)
    return figure


def draw_evidence() -> Figure:
    """Draw digits, and where LeNet-5 and a full net find evidence for a class: one digit and one class per column."""
    from matplotlib import pyplot

    from cnnlib.interpret.activations import activations
    from cnnlib.interpret.evidence import class_evidence

    nets, data = trained(BOTH)
    conv, full = (nets[name][0] for name in BOTH)
    labels = np.asarray(data.test.y)
    answers = [activations(net, data.test.x, (len(net.model.layers) - 1,))[0].argmax(axis=1) for net in (conv, full)]
    right = (answers[0] == labels) & (answers[1] == labels)
    columns = [
        (int(example), label) for label in (0, 3, 4, 7) for example in np.flatnonzero(right & (labels == label))[:1]
    ]
    for wrong in np.flatnonzero(answers[0] != labels)[:1]:
        columns += [(int(wrong), int(answers[0][wrong])), (int(wrong), int(labels[wrong]))]
    figure, panels = pyplot.subplots(3, len(columns), figsize=(9.6, 5.4), layout="constrained")
    for column, (example, label) in zip(panels.T, columns, strict=True):
        image = data.test.x[example]
        column[0].imshow(image[..., 0], cmap="gray")
        told = f"a {labels[example]}: conv says {answers[0][example]},\nfull {answers[1][example]}"
        column[0].set_title(told, fontsize=9)
        column[1].imshow(class_evidence(conv, image, label), cmap=MAPS, vmin=0)
        column[1].contour(image[..., 0], levels=[127], colors="white", linewidths=0.8)
        column[1].set_title(f"for {label}", fontsize=9)
        signed = class_evidence(full, image, label)
        bound = float(np.abs(signed).max())
        column[2].imshow(signed, cmap=SIGNED, vmin=-bound, vmax=bound)
        column[2].contour(image[..., 0], levels=[127], colors="black", linewidths=0.5)
        column[2].set_title(f"for {label}", fontsize=9)
    for panel, name in zip(panels[:, 0], ("test digit", "conv: Grad-CAM", "full: gradient x input"), strict=True):
        panel.set_ylabel(name, fontsize=9)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    return figure


SEEDS = 5


def draw_probes() -> Figure:
    """Draw how the accuracy of linear probes changes with depth, in one panel per net."""
    from matplotlib import pyplot

    from cnnlib.interpret.probes import linear_probes

    nets, data = trained(BOTH, SEEDS, epochs=2)
    (pixels,) = linear_probes(nets["lenet5"][0], data, (None,))  # the pixels are the same for all nets
    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.6), sharey=True, width_ratios=(6, 4), layout="constrained")
    for panel, name, title, reading in zip(panels, BOTH, ("LeNet-5", "LeNet-300-100"), ("conv", "full"), strict=True):
        color, marker = STYLE[reading]
        model = nets[name][0].model
        found = [linear_probes(net, data, steps(model)) for net in nets[name]]
        accuracies = 100 * np.array([[probe.accuracy for probe in lane] for lane in found])
        intervals = np.array([mean_interval(column)[:3] for column in accuracies.T], float)
        places = np.arange(1 + len(intervals))
        means = np.concatenate([[100 * pixels.accuracy], intervals[:, 0]])
        lows = np.concatenate([means[:1], intervals[:, 1]])
        label = "linear probe, mean and 95 % interval"
        panel.errorbar(places, means, yerr=means - lows, color=color, marker=marker, capsize=3, label=label)
        beside = places[1:] + 0.15 + 0.05 * np.arange(len(accuracies))[:, None]
        panel.plot(
            beside.T.ravel(), accuracies.T.ravel(), ".", color=GREY, label=f"each of n = {len(accuracies)} seeds"
        )
        own = 100 * float(np.mean([net.test_accuracy for net in nets[name]]))
        panel.axhline(own, color="black", linestyle=":", linewidth=1.2, label=f"the nets themselves, mean {own:.1f} %")
        for place, mean, low in zip(places, means, lows, strict=True):
            beneath = {"xytext": (0, -6), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 9}
            panel.annotate(f"{mean:.1f}", (place, low), color=color, **beneath)
        names = ["pixels", *(str(model.layers[layer]) for layer in steps(model))]
        features = [pixels.features, *(probe.features for probe in found[0])]
        panel.set_xticks(places, [f"{what}\n{n:,}" for what, n in zip(names, features, strict=True)], fontsize=9)
        panel.set_xlim(-0.5, places[-1] + 0.6)
        panel.set_title(f"{title} ({reading})", fontsize=10)
        panel.set_xlabel("layer, and the features that it puts out")
        panel.legend(fontsize=8, loc="lower right")
        panel.margins(y=0.12)
    panels[0].set_ylabel(f"test accuracy of the probe, % of {len(data.test.y):,}")
    return figure


def steps(model: Model) -> list[int]:
    """Return the layers to probe: each layer just before a layer with weights, and the last layer (the logits)."""
    weighted = [index for index, layer in enumerate(model.layers) if isinstance(layer, Filter | Dense)]
    return [*(index - 1 for index in weighted if index), len(model.layers) - 1]


ANGLES = np.arange(0.0, 180.0, 7.5)
CLASS_ANGLES = np.array([0.0, 45.0, 90.0, 135.0, 180.0])
"""Angles in degrees of the lines in the data set `lines`. 0 and 180 are horizontal, 90 is vertical."""


def draw_tuning() -> Figure:
    """Draw the filters and tuning curves of one net, and the angle and selectivity of all units of three nets."""
    from matplotlib import pyplot

    from cnnlib.interpret.patches import first_filters
    from cnnlib.interpret.tuning import orientation_tuning

    nets, _ = trained(("lenet5",), 3, "lines")
    tunings = [orientation_tuning(net, ANGLES) for net in nets["lenet5"]]
    filters, tuned = first_filters(nets["lenet5"][0])[..., 0], tunings[0]
    figure = pyplot.figure(figsize=(9.6, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.15, 1))
    above, below = figure.add_subfigure(grid[0, 0]), figure.add_subfigure(grid[1, 0])
    panels = above.subplots(2, len(filters), height_ratios=(1, 1.5))
    bound = float(np.abs(filters).max())
    half_turn = np.deg2rad(ANGLES)
    for unit, (shown, curve) in enumerate(panels.T):
        shown.imshow(filters[unit], cmap=SIGNED, vmin=-bound, vmax=bound, interpolation="nearest")
        shown.set(xticks=[], yticks=[])
        shown.set_title(f"unit {unit}", fontsize=10)
        place = curve.get_subplotspec()
        curve.remove()
        polar = above.add_subplot(place, projection="polar")
        circle = np.concatenate([half_turn, half_turn + np.pi, half_turn[:1]])
        response = tuned.responses[unit]
        polar.plot(circle, np.concatenate([response, response, response[:1]]), color=CONV)
        polar.set(ylim=(0, 1.05 * tuned.responses.max()), yticklabels=[])
        polar.set_xticks(np.deg2rad([0, 45, 90, 135, 180, 225, 270, 315]), [])
        told = "silent" if np.isnan(tuned.selectivity[unit]) else f"selectivity {tuned.selectivity[unit]:.2f}"
        polar.set_title(told, fontsize=9)
    scatter = below.subplots()
    for lane, (found, marker) in enumerate(zip(tunings, "os^", strict=True)):
        scatter.plot(found.preferred, found.selectivity, marker, color=CONV, label=f"seed {lane}", fillstyle="none")
    for angle in CLASS_ANGLES:
        scatter.axvline(angle, color=FULL, linestyle="--", linewidth=1, zorder=0)
    random = orientation_tuning(random_filters(filters.shape[1:]), ANGLES)
    selectivity, preferred = (
        np.concatenate([getattr(found, column) for found in tunings]) for column in ("selectivity", "preferred")
    )
    for color, line, values, angles, what in (
        (CONV, "-", selectivity, preferred, f"these {len(selectivity)} units"),
        ("#666666", ":", random.selectivity, random.preferred, f"{len(random.selectivity):,} random filters"),
    ):
        mean, share = float(np.nanmean(values)), 100 * along_a_class(angles).mean()
        label = f"{what}: mean {mean:.2f}, {share:.0f} % within {ANGLES[1]:g} degrees of a class"
        scatter.axhline(mean, color=color, linestyle=line, linewidth=1.2, label=label)
    scatter.set(xlim=(-5, 185), ylim=(0, 1.3), xticks=np.arange(0, 181, 45), yticks=np.linspace(0, 1, 6))
    scatter.set(xlabel="angle of the bar that excites a unit most, degrees (dashed: lines of a class)")
    scatter.set_ylabel("selectivity")
    scatter.legend(fontsize=8, loc="upper center", ncols=2, framealpha=1)
    return figure


def along_a_class(angles: np.ndarray) -> np.ndarray:
    """Return one boolean per angle: is the angle at most one measured step away from an angle in `CLASS_ANGLES`?"""
    return np.asarray((np.abs(angles[:, None] - CLASS_ANGLES) <= ANGLES[1]).any(axis=1))


def random_filters(shape: tuple[int, ...]) -> Net:
    """Return a net of 1,000 filters with normally distributed weights."""
    from cnnlib.interpret.trained import Net

    kernel = np.random.RandomState(0).normal(size=(*shape, 1, 1000)).astype(np.float32)
    zeros = np.zeros(1, np.float32)
    return Net(Model((Conv(1000, shape),)), {"layer_0": {"kernel": kernel}}, {}, (*shape, 1), zeros, zeros + 1, 0.0)
