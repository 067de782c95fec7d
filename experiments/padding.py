"""Does it cost anything that a convolution without padding loses the rim of the map?

Question: zero padding keeps the size n of the map; without padding it is n - k + 1. What do the same two layers reach
    both ways? Connections and the last layer's parameters change with it. A third arm has equal parameters.
Command: cnnlib run padding
Expected: no clear difference with ten seeds, since digits lie in the middle of their images.
Cost: about 1 minute on 2 CPU cores.
Source: the article's "slightly smaller" maps; training as in fc_vs_conv.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.spec.notation import parse_model

from ._digits import on_digits


@EXPERIMENTS.register
def padding() -> Experiment:
    same = parse_model("conv:8@5 relu max:2 conv:16@5 relu max:2 dense:classes")
    valid = parse_model("conv:8@5:valid relu max:2 conv:16@5:valid relu max:2 dense:classes")
    return on_digits(Arm("same", same), Arm("valid", valid), Arm("valid_matched", valid, match="parameters:same"))
