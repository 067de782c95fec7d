"""How large should a filter be?

Question: filters of 1, 3, 5, 7 and 9 places a side in the same two layers, as they are and at the parameters of 5x5.
Command: cnnlib run kernel_size
Expected: 1x1, which sees no neighbours, far behind; from 3x3 on more accurate and dearer, with little left after 5x5.
Cost: about 3 minutes on 2 CPU cores.
Source: a classic ablation; training as in fc_vs_conv.
"""

from dataclasses import replace

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.config.sweep import points, product
from cnnlib.spec.notation import parse_model

from ._digits import on_digits

COMPARED = ("3x3:1x1", "5x5:3x3", "7x7:5x5", "9x9:7x7", "5x5:3x3_matched", "7x7_matched:5x5", "9x9_matched:5x5")


@EXPERIMENTS.register
def kernel_size() -> Experiment:
    def arm(side: int, matched: bool) -> Arm:
        net = parse_model(f"conv:8@{side} relu max:2 conv:16@{side} relu max:2 dense:classes")
        return Arm(
            f"{side}x{side}_matched" if matched else f"{side}x{side}", net, match="parameters:5x5" if matched else None
        )

    sizes = product(matched=(False, True), side=(1, 3, 5, 7, 9))
    experiment = on_digits(*points(sizes, arm, where=lambda side, matched: not (matched and side == 5)))
    return replace(experiment, comparisons=COMPARED)
