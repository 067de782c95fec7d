"""How large should a filter be?

Question: what do 1x1, 3x3, 5x5, 7x7 and 9x9 filters reach in the same two layers, as they are and at the parameters of
    5x5?
Command: cnnlib run kernel_size
Expected: 1x1 sees no neighbours and is far behind. From 3x3 on, larger filters are more accurate and cost more. After
    5x5 they gain little.
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
