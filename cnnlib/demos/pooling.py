"""Show what padding changes at the border of a map, and how pooling changes the effect of a small shift."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnlib.data.declaration import Data
from cnnlib.data.sets import load
from cnnlib.demos import window_steps
from cnnlib.demos.demo import DEMOS, Demo
from cnnlib.errors import UserError
from cnnlib.report.style import STYLE
from cnnlib.stats.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, GREEN, RED = (STYLE[reading][0] for reading in ("full", "local", "conv"))


@DEMOS.register
def padding() -> Demo:
    """A map without padding and with zeros around the image: its size, and how much it sees of the border."""
    return Demo(
        draw_padding,
        "padding.png",
        "Without padding no window has its middle on the border: the stroke in the first column gives -3, the same "
        "stroke further in 6. With zeros around the image both give 6. A pixel in a corner is seen by 1 window without "
        "padding and by 4 with it, where others are seen by 9. Each 3x3 layer without padding takes 2 pixels off the "
        "side: of 28 it leaves 2 after 13.",
    )


@DEMOS.register
def shifts() -> Demo:
    """How much a map changes when a digit is moved by a few pixels, before pooling and after."""
    return Demo(
        draw_shifts,
        "shifts.png",
        "A map moves along with its image: moved back, it is the same. Place by place, it changes by 0.93 of its norm "
        "when the digit moves by 1 pixel. Pooling of 2x2 takes that to 0.62 (max) and 0.64 (average), of 4x4 to 0.39 "
        "and 0.38. One pixel of each block, taken without looking, changes as much as the whole map, 0.93 and 0.93: it "
        "is not the smaller map that helps. And no block hides a shift of its own size: of 2x2, moved by 2 pixels, the "
        "pooled maps change by 0.95 and 1.02.",
    )


STROKES = (((2, 0), (9, 0)), ((2, 6), (9, 6)))
"""Two equal strokes, each given by its first and last pixel. One stroke is in the first column."""
SIDE, SIZE = 12, 3
"""Side of the image and side of the filter, in pixels."""
STACKED, MOST_LAYERS = 28, 13
"""Side in pixels of the image under stacked layers, and how many 3x3 layers without padding fit into the image."""


def draw_padding() -> Figure:
    """Draw maps of two strokes, the side of a map by depth, and how often a pixel is seen, with and without padding."""
    from matplotlib import pyplot

    image, kernel = window_steps.strokes((SIDE, SIDE), STROKES), window_steps.line_filter("vertical", SIZE)
    figure, panels = pyplot.subplots(2, 3, figsize=(10.0, 6.8), layout="constrained")
    panels[0, 0].imshow(image, cmap="cividis")
    panels[0, 0].set_title(f"image, {SIDE}x{SIDE}\ntwo equal strokes", fontsize=10)
    most = SIZE * (SIZE - 1)
    for column, (padding, words) in enumerate((("VALID", "without padding"), ("SAME", "zeros around")), start=1):
        window = window_steps.window_for(image.shape, SIZE, padding=padding)
        above, below = panels[:, column]
        made = window_steps.slide(image, kernel, padding=padding)
        first = SIZE // 2 - window.padding[0][0] - 0.5
        extent = (first, first + made.shape[1], first + made.shape[0], first)  # each number at the middle of its window
        shown = above.imshow(made, cmap="cividis", vmin=-most / 2, vmax=most, extent=extent)
        above.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
        zeros = sum(window.padding[0])
        formula = f"{SIDE}{f' + {zeros}' if zeros else ''} - {SIZE} + 1 = {window.output_size[0]} places an axis"
        above.set_title(f"map, {words}\n{formula}", fontsize=10)
        seen = window_steps.times_seen(window)
        counts = below.imshow(seen, cmap="cividis", vmin=0, vmax=SIZE**2)
        for row, at in ((0, 0), (0, SIDE // 2), (SIDE // 2, SIDE // 2)):
            color = "black" if seen[row, at] > SIZE**2 / 2 else "white"
            below.text(at, row, str(seen[row, at]), ha="center", va="center", color=color, fontsize=10)
        on_zeros = window_steps.share_on_padding(window)
        below.set_title(f"windows over a pixel, {words}\n{100 * on_zeros:.1f} % of the taps on zeros", fontsize=10)
    for panel in (*panels[0], *panels[1, 1:]):
        panel.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=panels[0], label="sum under the filter", aspect=15)
    figure.colorbar(counts, ax=panels[1], label="windows", aspect=15)
    layers = np.arange(MOST_LAYERS + 1)
    cases = (
        (3, "SAME", GREEN, "s", "any, zeros around"),
        (3, "VALID", RED, "^", "3x3"),
        (5, "VALID", BLUE, "o", "5x5"),
    )
    for size, padding, color, marker, label in cases:
        sides = sides_by_depth(STACKED, size, padding, MOST_LAYERS)
        panels[1, 0].plot(layers[: len(sides)], sides, color=color, marker=marker, markersize=4, label=label)
    panels[1, 0].legend(fontsize=9, loc="upper right", bbox_to_anchor=(1.0, 0.88))
    panels[1, 0].set(xlabel="layers", ylabel="side of the map, pixels", xticks=layers[::2], ylim=(0, 31), box_aspect=1)
    panels[1, 0].set_title(f"{STACKED}x{STACKED}, layer upon layer", fontsize=10)
    return figure


def sides_by_depth(side: int, size: int, padding: str, layers: int) -> list[int]:
    """Return the side of the map after 0, 1, ... filters. Stop after `layers` filters or when no filter fits."""
    sides = [side]
    while len(sides) <= layers and (padding == "SAME" or sides[-1] >= size):
        sides.append(window_steps.window_for((sides[-1], sides[-1]), size, padding=padding).output_size[0])
    return sides


KERNELS = np.stack([window_steps.line_filter(kind) for kind in window_steps.LINE_FILTERS], axis=-1)
DIGITS = 100
MOST_SHIFT, FREE = 4, 6
"""The largest shift of a digit, and the width of the zeros that keep the shifted digit in the image, in pixels."""
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))
POOLINGS: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], str, str]] = {
    "one pixel of {size}x{size}": (lambda maps, size: maps[::size, ::size], GREEN, "s"),
    "average of {size}x{size}": (window_steps.average_pool, BLUE, "o"),
    "max of {size}x{size}": (window_steps.max_pool, RED, "^"),
}
"""Functions that make a map smaller. Each function has a colour and a marker."""


def draw_shifts() -> Figure:
    """Draw how much a map changes when the image shifts, without pooling and with pooling blocks of two sizes."""
    from matplotlib import pyplot

    digits = some_digits(DIGITS)
    distances = np.arange(1, MOST_SHIFT + 1)
    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.4), sharey=True, layout="constrained")

    def draw(on: Sequence[Axes], changes: np.ndarray, label: str, **line: Any) -> None:
        intervals = [mean_interval(each) for each in changes.T]
        mean, low, high = (np.array([0.0, *(each[end] for each in intervals)]) for end in range(3))
        for panel in on:
            panel.plot([0, *distances], mean, label=label, **line)
            panel.fill_between([0, *distances], low, high, color=line["color"], alpha=0.25, linewidth=0)

    draw(panels, changes_of(maps_of, digits), "map, before pooling", color="black", linestyle="--")
    for panel, size in zip(panels, (2, 4), strict=True):
        for name, (pool, color, marker) in POOLINGS.items():

            def pooled(image: np.ndarray, pool: Any = pool, size: int = size) -> np.ndarray:
                return np.asarray(pool(maps_of(image), size))

            label = name.format(size=size)
            draw([panel], changes_of(pooled, digits), label, color=color, marker=marker)
        panel.axhline(math.sqrt(2), color="#777777", linewidth=1, linestyle=":", label="nothing in common, √2")
        panel.set(xlabel="shift, pixels", xticks=[0, *distances], ylim=(0, 1.5))
        panel.set_title(f"{size}x{size} blocks", fontsize=10)
        panel.legend(fontsize=9, loc="lower right")
    panels[0].set_ylabel("change of the map, over its norm")
    figure.suptitle(
        f"{len(digits)} digits of MNIST, each moved four ways; mean and 95 % interval (Student's t, n = {len(digits)})",
        fontsize=10,
    )
    return figure


def some_digits(count: int) -> np.ndarray:
    """Return test digits of mnist5k, `(count, height, width)`. Values are 0 to 1; `FREE` zeros surround each digit.

    The digits are spread evenly over the classes. Raises UserError if `count` is below 1 or above the number of digits.
    """
    x = load(Data("mnist5k")).test.x  # sorted by class
    if not 1 <= count <= len(x):
        raise UserError(f"count={count}: there are {len(x):,} test digits")
    chosen = x[np.linspace(0, len(x), count, endpoint=False).astype(int), :, :, 0] / 255.0
    return np.pad(chosen, ((0, 0), (FREE, FREE), (FREE, FREE)))


def maps_of(image: np.ndarray) -> np.ndarray:
    """Return the maps `(rows, columns, filter)` of four line filters after a ReLU. Maps are as large as the image."""
    return np.asarray(np.maximum(window_steps.as_product(image, KERNELS, padding="SAME").maps, 0.0))


def changes_of(function: Callable[[np.ndarray], np.ndarray], digits: np.ndarray) -> np.ndarray:
    """Return by how much the map of each digit changes if the digit is shifted, as an array `(digit, distance)`.

    For each distance, the change is the mean over shifts in four directions.
    """
    ways = [(step * down, step * right) for step in range(1, MOST_SHIFT + 1) for down, right in DIRECTIONS]
    changes = [window_steps.shift_change(function, digit, ways) for digit in digits]
    return np.asarray(np.reshape(changes, (len(digits), MOST_SHIFT, len(DIRECTIONS))).mean(axis=-1))
