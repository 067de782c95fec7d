"""Draw convolution as the area of an overlap, convolution beside correlation, and a telescope's dirty map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cnnlib.demos.demo import DEMOS, Demo
from cnnlib.demos.sliding import Box, Exponential, convolve, convolved, correlate, dirty_map, point_sources
from cnnlib.report.style import STYLE

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


BLUE, GREEN, RED = (STYLE[reading][0] for reading in ("full", "local", "conv"))


@DEMOS.register
def overlap() -> Demo:
    """The convolution of two functions as the area in which they overlap."""
    return Demo(
        draw_overlap,
        "overlap.gif",
        "Blue is mirrored before it slides: its steep side comes first. The green curve is the shaded area, at each "
        "place. It grows while the two overlap more and more, and never jumps although both functions do.",
    )


@DEMOS.register
def flip() -> Demo:
    """Convolution against correlation: the mirrored kernel against the kernel as it is."""
    return Demo(
        draw_flip,
        "flip.png",
        "A lone 1 convolved with a kernel gives the kernel; correlated, it gives the kernel from back to front. Nets "
        "correlate and call it a convolution: their kernels are learned, so it makes no difference to them.",
    )


@DEMOS.register
def beam() -> Demo:
    """A dirty map: the sky's point sources convolved with the telescope's beam."""
    return Demo(
        draw_beam,
        "beam.png",
        "Every source looks like the beam, as bright as the source. Two that are closer than the beam is wide look "
        "like one: their images add up.",
    )


STANDING, SLIDING = Box(1.5, 0.0), Exponential(1.2)


def draw_overlap(count: int = 45) -> FuncAnimation:
    """Animate an exponential that slides over a box, and draw the area of their product.

    The animation has `count` frames. The exponential is at another place in each frame.
    """
    from matplotlib import pyplot
    from matplotlib.animation import FuncAnimation

    places = np.linspace(-1.5, 4.0, count)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(6.4, 4.8), sharex=True, layout="constrained")
    s = np.linspace(-4.0, 4.0, 801)
    above.plot(s, STANDING(s), color=RED, label="f(s), a box")
    (sliding,) = above.plot([], [], color=BLUE, label="g(t - s), mirrored and moved by t")
    shade = above.fill_between(s, np.zeros_like(s), color=GREEN, alpha=0.45, label="their product")
    above.set(ylim=(-0.05, 1.3), xlim=(-4.0, 4.0))
    above.legend(loc="upper left", ncols=3, fontsize=8)
    areas = convolved(STANDING, SLIDING, places)
    (drawn,) = below.plot([], [], color=GREEN, linewidth=2)
    (now,) = below.plot([], [], "o", color=GREEN)
    below.set(ylim=(-0.05, 1.1 * float(areas.max())), xlabel="s above, t below", ylabel="area = (f * g)(t)")
    title = above.set_title("t = 0.0")
    figure.draw_without_rendering()  # computes the layout once, not for each frame
    figure.set_layout_engine("none")

    def update(frame: int) -> tuple[Artist, ...]:
        t = places[frame]
        sliding.set_data(s, SLIDING(t - s))
        shade.set_data(s, np.zeros_like(s), STANDING(s) * SLIDING(t - s))
        drawn.set_data(places[: frame + 1], areas[: frame + 1])
        now.set_data([t], [areas[frame]])
        title.set_text(f"t = {t:.1f}: overlap {areas[frame]:.2f}")
        return sliding, shade, drawn, now, title

    return FuncAnimation(figure, update, frames=len(places), interval=80)


KERNEL = np.array([1.0, 2.0, 4.0])


def draw_flip() -> Figure:
    """Draw a row of numbers, its convolution with a kernel, and its correlation with the kernel."""
    from matplotlib import pyplot

    row = np.array([0.0, 0, 1, 0, 0, 0, 1, 1, 0, 0])
    rows = (
        ("x: a lone 1, and a pair", row, RED),
        ("convolution with 1, 2, 4: the kernel as it is", convolve(row, KERNEL)[: len(row)], GREEN),
        ("correlation with 1, 2, 4: from back to front", correlate(row, KERNEL)[: len(row)], BLUE),
    )
    figure, panels = pyplot.subplots(3, 1, figsize=(6.4, 5.2), sharex=True, layout="constrained")
    for panel, (title, values, color) in zip(panels, rows, strict=True):
        panel.bar(np.arange(len(values)), values, color=color, width=0.7)
        panel.set_title(title, fontsize=10)
        panel.set_ylim(0, 1.15 * max(2.0, values.max()))
        for place, value in enumerate(values):
            if value:
                panel.text(place, value, f"{value:g}", ha="center", va="bottom")
    panels[-1].set(xlabel="place", xticks=np.arange(len(row)))
    return figure


def draw_beam() -> Figure:
    """Draw a clean map, a beam and the dirty map. Each picture has its own scale of brightness."""
    from matplotlib import pyplot

    clean = point_sources((48, 48), [(12, 10), (31, 31), (34, 32), (16, 38)], [1.0, 0.8, 0.8, 0.5])
    across = np.hypot(*np.meshgrid(np.arange(-10, 11), np.arange(-10, 11)))
    telescope = np.exp(-(across**2) / 12) * np.cos(across / 2.2)
    maps = (("clean: point sources", clean), ("beam", telescope), ("dirty = clean * beam", dirty_map(clean, telescope)))
    figure, panels = pyplot.subplots(1, 3, figsize=(9.6, 3.4), layout="constrained")
    for panel, (title, values) in zip(panels, maps, strict=True):
        image = panel.imshow(values, cmap="cividis", interpolation="nearest")
        panel.set_title(title, fontsize=10)
        figure.colorbar(image, ax=panel, shrink=0.75)
        panel.set(xticks=[], yticks=[])
    return figure
