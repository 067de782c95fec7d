"""Does a deeper net do better, at equal cost?

Question: what do one to four 3x3 convolutions reach, as they are and at the multiply-adds of two? The first two are
    each followed by pooling that halves the map.
Command: cnnlib run depth
Expected: the second layer gains most. At equal multiply-adds the third and fourth gain little on digits.
Cost: about 3 minutes on 2 CPU cores.
Source: a classic ablation; training as in fc_vs_conv.
"""

from dataclasses import replace

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.config.sweep import points, product
from cnnlib.spec.notation import parse_model

from ._digits import on_digits

LAYERS = ("conv:8@3 relu max:2", "conv:16@3 relu max:2", "conv:16@3 relu", "conv:16@3 relu")

COMPARED = (
    "2_layers:1_layers",
    "3_layers:2_layers",
    "4_layers:3_layers",
    "2_layers:1_matched",
    "3_matched:2_layers",
    "4_matched:2_layers",
)


@EXPERIMENTS.register
def depth() -> Experiment:
    def arm(layers: int, matched: bool) -> Arm:
        net = parse_model(f"{' '.join(LAYERS[:layers])} dense:classes")
        return Arm(
            f"{layers}_matched" if matched else f"{layers}_layers", net, match="macs:2_layers" if matched else None
        )

    depths = product(matched=(False, True), layers=(1, 2, 3, 4))
    experiment = on_digits(*points(depths, arm, where=lambda layers, matched: not (matched and layers == 2)))
    return replace(experiment, comparisons=COMPARED)
