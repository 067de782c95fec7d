"""Why not simply connect everything: how do connections and parameters grow with the side of the input?

Question: how many connections and parameters does a layer have on square images, as a full layer, as a local one with
    3x3 windows, and as a 3x3 convolution? It keeps the number of nodes (3 colours in, 3 features out).
Command: cnnlib run explosion
Expected: at 32x32 the full layer has 9,437,184 connections, at 1000x1000 9 x 10^12 (in grey, one feature of one
    channel, 10^12). It grows with the fourth power of the side. The local layer grows with the second power, as do the
    convolution's connections. The convolution has 84 parameters (81 weights and 3 biases) at any side.
Cost: a second on one CPU core. It trains nothing.
Source: the textbook argument for convolutions; counts are exact (cnnlib/spec/counts.py states the conventions).
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Growth
from cnnlib.spec.layers import Conv
from cnnlib.spec.model import Model


@EXPERIMENTS.register
def explosion() -> Growth:
    layer = Model((Conv(3, 3),))
    return Growth(
        arms=(Arm("full", layer, "full"), Arm("local", layer, "local"), Arm("conv", layer, "conv")),
        sides=(8, 16, 32, 64, 128, 256, 512, 1000, 2048, 4096),
    )
