"""How much does width buy?

Question: what does a two-layer convolutional net reach with a quarter to twice its filters in every layer?
Command: cnnlib run width
Expected: accuracy grows by less with each doubling. Parameters grow with the width, and multiply-adds with its square.
Cost: about 3 minutes on 2 CPU cores.
Source: a classic ablation; training as in fc_vs_conv.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.spec.budget import scaled
from cnnlib.spec.notation import parse_model

from ._digits import on_digits

WIDTHS = {"quarter": 0.25, "half": 0.5, "full": 1.0, "double": 2.0}


@EXPERIMENTS.register
def width() -> Experiment:
    net = parse_model("conv:8@3 relu max:2 conv:16@3 relu max:2 dense:classes")
    return on_digits(*(Arm(f"{name}_width", scaled(net, multiplier)) for name, multiplier in WIDTHS.items()))
