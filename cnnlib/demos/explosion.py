"""The cost of a full layer as images grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnnlib.config.schema import EXPERIMENTS, Growth
from cnnlib.demos.demo import DEMOS, Demo

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@DEMOS.register
def explosion() -> Demo:
    """Connections and parameters against the side of the input: full, local and convolutional."""
    return Demo(
        draw_explosion,
        "explosion.png",
        "Both axes are logarithmic. Twice the side is sixteen times the connections of a full layer and four times "
        "those of a local layer or a convolution, which are equal: sharing saves no connection. It saves parameters: "
        "the convolution has 84 at any side. At 32x32 in colour: 9,437,184 connections when full, "
        "82,944 with 3x3 windows.",
    )


def draw_explosion() -> Figure:
    """Draw the figure of the experiment `explosion`."""
    from cnnlib.report.growth import counted, draw

    experiment = EXPERIMENTS.get("explosion")
    assert isinstance(experiment, Growth)
    return draw(counted(experiment, "explosion"))
