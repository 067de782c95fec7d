"""Draw filters and pooling number by number: responses, steps, products of matrices, and pooling blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cnnlib.demos import window_steps
from cnnlib.demos.demo import DEMOS, Demo
from cnnlib.demos.window_steps import LINE_FILTERS, Place
from cnnlib.report.style import STYLE

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, GREEN, RED = (STYLE[reading][0] for reading in ("full", "local", "conv"))
SKY = "#56B4E9"
"""A fourth colour of Okabe and Ito, so that each tap of a 2x2 filter has a different colour."""
SIGNED, UNSIGNED = "PuOr", "cividis"
"""Colour maps: `SIGNED` for filters, `UNSIGNED` for images and maps. Both suit colour-blind readers."""


@DEMOS.register
def filters() -> Demo:
    """Line filters and their feature maps: each answers to lines of its own orientation."""
    return Demo(
        draw_filters,
        "filters.png",
        "Each map is bright where the drawing has lines of the filter's own orientation: 6 along such a line, at "
        "most 2 along one of another orientation, and something between where lines meet or end. Flat areas give 0, "
        "because the numbers of a filter sum to 0.",
    )


@DEMOS.register
def steps() -> Demo:
    """A 2x2 filter slides over an image: the window, the products and their sum, number by number."""
    return Demo(
        draw_steps,
        "steps.gif",
        "At each place the four numbers under the filter are multiplied by the filter's and summed: one number of the "
        "map. Of 4 pixels a filter of 2 makes 4 - 2 + 1 = 3 places. The map is largest, 6, along the bright diagonal, "
        "which is what the filter looks for.",
    )


@DEMOS.register
def product() -> Demo:
    """A convolution as a product of matrices: windows times filters, and the weights of a full layer."""
    return Demo(
        draw_product,
        "product.png",
        "Above, every window is a row and every filter a column, and one product gives both maps. Below, the weights "
        "of the full layer that computes the first map: of 144, 108 are 0 and 36 repeat the filter's 4 numbers, one "
        "colour each. A convolution is that layer with 4 parameters.",
    )


@DEMOS.register
def pooling() -> Demo:
    """Max pooling, block by block: blocks side by side, and blocks that overlap."""
    return Demo(
        draw_pooling,
        "pooling.gif",
        "The largest number of each block goes on; where it was in the block is lost. Left, 2x2 blocks side by side: 6 "
        "pixels make 3. Right, 3x3 blocks with stride 2 on one row and column more: they share a row or column with "
        "their neighbours, and the 9, which is in four of them, wins four times.",
    )


HOUSE = (
    ((9, 4), (17, 4)),
    ((9, 16), (17, 16)),
    ((9, 4), (9, 16)),
    ((17, 4), (17, 16)),
    ((9, 4), (3, 10)),
    ((3, 10), (9, 16)),
    ((12, 9), (17, 9)),
    ((12, 9), (12, 12)),
    ((12, 12), (17, 12)),
)
"""The lines of a house (walls, ceiling, floor, roof, door). They have all four orientations."""


def draw_filters() -> Figure:
    """Draw an image and four filters, and draw each filter's map below the filter. All maps share one scale."""
    from matplotlib import pyplot

    house = window_steps.strokes((21, 21), HOUSE)
    kernels = np.stack([window_steps.line_filter(kind) for kind in LINE_FILTERS], axis=-1)
    maps = window_steps.as_product(house, kernels).maps
    figure = pyplot.figure(figsize=(11.0, 3.9), layout="constrained")
    grid = figure.add_gridspec(2, 1 + len(LINE_FILTERS), width_ratios=[1.5, 1, 1, 1, 1], height_ratios=[0.6, 1])
    drawing = figure.add_subplot(grid[:, 0])
    drawing.imshow(house, cmap=UNSIGNED)
    drawing.set_title("image, 21x21", fontsize=10)
    below = []
    for index, kind in enumerate(LINE_FILTERS):
        cells = Cells(figure.add_subplot(grid[0, index + 1]), kernels.shape[:2], SIGNED, -2.5, 2.5)
        cells.show(kernels[..., index])
        cells.panel.set_title(f"{kind} filter", fontsize=10)
        panel = figure.add_subplot(grid[1, index + 1])
        image = panel.imshow(maps[..., index], cmap=UNSIGNED, vmin=maps.min(), vmax=maps.max())
        panel.set_title(f"its map, {maps.shape[0]}x{maps.shape[1]}", fontsize=10)
        below.append(panel)
    for panel in (drawing, *below):
        panel.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=below, label="sum under the filter", aspect=15)
    return figure


IMAGE = np.array([[3.0, 0, 0, 1], [0, 3, 0, 1], [0, 0, 3, 1], [2, 2, 2, 1]])
KERNEL = np.array([[1.0, -1], [-1, 1]])
PHASES = 3
"""Phases of a step: place the window, compute the products, write their sum."""
SECONDS_A_PHASE, SECONDS_A_BLOCK = 0.4, 0.7
REST = 3
"""Number of frames that show the finished map."""


def draw_steps() -> FuncAnimation:
    """Animate the window on the image, the product of window and filter, and the map, which grows."""
    from matplotlib import pyplot
    from matplotlib.animation import FuncAnimation

    taken, result = list(window_steps.steps(IMAGE, KERNEL)), window_steps.slide(IMAGE, KERNEL)
    figure, panels = pyplot.subplots(1, 4, figsize=(8.4, 3.1), width_ratios=[4, 2, 2, 3])
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.15, top=0.88, wspace=0.25)
    image = Cells(panels[0], IMAGE.shape, UNSIGNED, 0, 3)
    kernel = Cells(panels[1], KERNEL.shape, SIGNED, -2, 2)
    products = Cells(panels[2], KERNEL.shape, SIGNED, -6, 6)
    sums = Cells(panels[3], result.shape, UNSIGNED, result.min(), result.max())
    for panel, title in zip(panels, ("image", "filter", "window x filter", "map"), strict=True):
        panel.set_title(title, fontsize=11)
    image.show(IMAGE)
    kernel.show(KERNEL)
    told = figure.text(0.5, 0.05, "", ha="center", fontsize=12)

    def update(frame: int) -> tuple[Artist, ...]:
        index, phase = divmod(min(frame, len(taken) * PHASES - 1), PHASES)
        step = taken[index]
        image.outline(step.corner, KERNEL.shape)
        sums.outline(step.place, (1, 1))
        products.show(step.product if phase >= 1 else np.full(KERNEL.shape, np.nan))
        done = index + (phase == PHASES - 1)
        sums.show(np.where(np.arange(result.size).reshape(result.shape) < done, result, np.nan))
        terms = zip(step.window.flat, KERNEL.flat, strict=True)
        sum_of = " + ".join(f"{x:g} · {w:g}" if w >= 0 else f"{x:g} · ({w:g})" for x, w in terms)
        told.set_text(("", sum_of, f"{sum_of} = {step.total:g}")[phase])
        return ()

    return FuncAnimation(figure, update, frames=len(taken) * PHASES + REST, interval=1000 * SECONDS_A_PHASE)


TAP_COLORS = (BLUE, RED, GREEN, SKY)
FILTERS = np.stack([KERNEL, np.array([[1.0, 1], [-1, -1]])], axis=-1)
CELL = 0.3
"""Side of a cell in inches, for grids of several sizes side by side."""


def draw_product() -> Figure:
    """Draw the matrix of windows times the matrix of two filters, and the full layer that equals the first filter."""
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    made = window_steps.as_product(IMAGE, FILTERS)
    matrix = window_steps.matrix_of(KERNEL, IMAGE.shape)
    # The same matrix, with taps numbered from 1. Entries with equal numbers are the same parameter.
    numbers = np.arange(1.0, 1 + KERNEL.size).reshape(KERNEL.shape)
    taps = window_steps.matrix_of(numbers, IMAGE.shape)
    columns, rows = 29, 34
    figure = pyplot.figure(figsize=(CELL * columns, CELL * rows))

    def grid(top: float, left: float, values: np.ndarray, title: str, colors: Any, shades: Any = None) -> None:
        down, across = values.shape
        panel = figure.add_axes((left / columns, 1 - (top + down) / rows, across / columns, down / rows))
        Cells(panel, values.shape, *colors).show(values, shades)
        panel.set_title(title, fontsize=9)

    def sign(top: float, left: float, text: str) -> None:
        figure.text(left / columns, 1 - top / rows, text, ha="center", va="center", fontsize=14)

    pixels, sums = (UNSIGNED, 0, 3), (UNSIGNED, made.maps.min(), made.maps.max())
    signed, by_tap = (SIGNED, -2, 2), (ListedColormap(("white", *TAP_COLORS)), 0, len(TAP_COLORS))
    for top, heading in (
        (1, "All windows times all filters"),
        (15, "The first filter as a full layer, 9 x 16 weights"),
    ):
        figure.text(1 / columns, 1 - top / rows, heading, va="center", fontsize=11, weight="bold")
    grid(4, 1, IMAGE, "image", pixels)
    sign(6, 6.5, "→")
    grid(4, 8, made.windows, "9 windows\nas rows", pixels)
    sign(6, 13.2, "x")
    grid(4, 14.5, made.filters, "2 filters\nas columns", signed)
    sign(6, 18, "=")
    grid(4, 19.5, made.maps.reshape(-1, made.maps.shape[-1]), "2 maps\nas columns", sums)
    sign(6, 23.2, "→")
    for index, top in enumerate((4, 9)):
        grid(top, 25, made.maps[..., index], f"map {index + 1}", sums)
    grid(17.5, 1, KERNEL, "filter", by_tap, numbers)
    sign(18.5, 4.5, "→")
    grid(17.5, 6, matrix, "weights: a row for each place of the map, a column for each pixel", by_tap, taps)
    sign(18.5, 23, "x")
    grid(17.5, 24, IMAGE.reshape(-1, 1), "image", pixels)
    sign(18.5, 26, "=")
    grid(17.5, 27, made.maps[..., 0].reshape(-1, 1), "map 1", sums)
    return figure


POOLED = np.array(
    [
        [1.0, 0, 2, 3, 0, 1, 2],
        [4, 6, 5, 8, 1, 0, 3],
        [3, 1, 9, 0, 2, 4, 1],
        [1, 2, 0, 4, 7, 5, 0],
        [0, 5, 1, 2, 3, 1, 6],
        [2, 0, 3, 8, 0, 2, 1],
        [1, 3, 0, 1, 4, 0, 2],
    ]
)
POOLINGS = (("2x2 blocks, stride 2", POOLED[:6, :6], 2), ("3x3 blocks, stride 2: they overlap", POOLED, 3))
"""Title, image and block size of each pooling. The two poolings have equally many blocks."""


def draw_pooling() -> FuncAnimation:
    """Animate two images. A block moves over each; the largest number in the block gets a ring and goes to the map."""
    from matplotlib import pyplot
    from matplotlib.animation import FuncAnimation

    # An empty panel in the middle separates the two poolings.
    figure, panels = pyplot.subplots(1, 5, figsize=(9.6, 3.2), width_ratios=[6, 3, 0.4, 7, 3])
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.12, top=0.88, wspace=0.12)
    panels[2].remove()
    parts = []
    for (title, pixels, size), pair in zip(POOLINGS, (panels[:2], panels[3:]), strict=True):
        blocks = list(window_steps.pool_blocks(pixels, size, strides=2))
        result = window_steps.max_pool(pixels, size, strides=2)
        image = Cells(pair[0], pixels.shape, UNSIGNED, 0, 9)
        pooled = Cells(pair[1], result.shape, UNSIGNED, 0, 9)
        image.show(pixels)
        (rings,) = pair[0].plot([], [], "o", markersize=19, markerfacecolor="none", markeredgecolor=RED, clip_on=False)
        pair[0].set_title(title, fontsize=10)
        pair[1].set_title("largest of each", fontsize=10)
        parts.append((size, blocks, result, image, pooled, rings, pair[0].set_xlabel("", fontsize=10)))

    def update(frame: int) -> tuple[Artist, ...]:
        for size, blocks, result, image, pooled, rings, told in parts:
            index = min(frame, len(blocks) - 1)
            block = blocks[index]
            image.outline(block.corner, (size, size))
            pooled.outline(block.place, (1, 1))
            won = np.array([each.winner for each in blocks[: index + 1]])
            rings.set_data(won[:, 1], won[:, 0])
            pooled.show(np.where(np.arange(result.size).reshape(result.shape) <= index, result, np.nan))
            told.set_text(f"largest {block.largest:g}, mean {block.mean:.2f}")
        return ()

    return FuncAnimation(figure, update, frames=len(parts[0][1]) + REST, interval=1000 * SECONDS_A_BLOCK)


class Cells:
    """A grid of numbers on a panel. The colour of a cell shows its number."""

    def __init__(self, panel: Axes, shape: tuple[int, ...], colors: Any, lowest: float, highest: float) -> None:
        self.panel = panel
        self.image = panel.imshow(np.full(shape, np.nan), cmap=colors, vmin=lowest, vmax=highest)
        self.texts = [
            panel.text(column, row, "", ha="center", va="center", fontsize=10) for row, column in np.ndindex(*shape)
        ]
        panel.set(xticks=[], yticks=[])
        for axis, side in ((panel.xaxis, shape[1]), (panel.yaxis, shape[0])):
            axis.set_ticks(np.arange(side - 1) + 0.5, minor=True)
        panel.grid(which="minor", color="#BBBBBB")
        panel.tick_params(which="minor", length=0)
        self.frame: Any = None

    def show(self, values: np.ndarray, shades: np.ndarray | None = None) -> None:
        """Write each number except NaN into its cell. Colour the cells by `shades`, or by the numbers if it is None."""
        shades = values if shades is None else shades
        self.image.set_data(shades)
        for text, value, color in zip(self.texts, values.flat, self.image.to_rgba(shades).reshape(-1, 4), strict=True):
            text.set_text("" if np.isnan(value) else f"{value + 0.0:g}")  # 0, not -0
            # Choose black or white text, whichever has more contrast. The contrast follows from the luminance in sRGB.
            text.set_color("black" if color[:3] ** 2.2 @ (0.2126, 0.7152, 0.0722) > 0.179 else "white")

    def outline(self, corner: Place, shape: tuple[int, ...]) -> None:
        """Remove the earlier frame, and draw a frame around the block of `shape` cells that begins at `corner`."""
        from matplotlib.patches import Rectangle

        if self.frame is None:
            # Do not clip: at the edge of the panel, half of the line's width lies outside the panel.
            self.frame = Rectangle((0, 0), 0, 0, fill=False, edgecolor=RED, linewidth=3.5, zorder=3, clip_on=False)
            self.panel.add_patch(self.frame)
        self.frame.set_bounds(corner[1] - 0.5, corner[0] - 0.5, shape[1], shape[0])
