"""Does pooling reduce overfitting, as the article says?

Question: one net has max pooling, mean pooling, a stride of 2 instead, or neither. What are accuracy, cost and the gap
    between training and test accuracy? What gap is left if the net without pooling has no more parameters than the
    others?
Command: cnnlib run pooling
Expected: all reach 100 % on their training images, so the gap is the error on the test images. It is smallest with max
    pooling. The net without pooling has the most parameters and multiply-adds.
Cost: about 2 minutes on 2 CPU cores.
Source: the article's claim that pooling makes the representation more abstract and reduces overfitting.
"""

from dataclasses import replace

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.spec.notation import parse_model

from ._digits import on_digits


@EXPERIMENTS.register
def pooling() -> Experiment:
    none = parse_model("conv:8@3 relu conv:16@3 relu dense:classes")
    experiment = on_digits(
        Arm("max", parse_model("conv:8@3 relu max:2 conv:16@3 relu max:2 dense:classes")),
        Arm("mean", parse_model("conv:8@3 relu avg:2 conv:16@3 relu avg:2 dense:classes")),
        Arm("stride", parse_model("conv:8@3/2 relu conv:16@3/2 relu dense:classes")),
        Arm("none", none),
        Arm("none_matched", none, match="parameters:max"),
    )
    pairs = ("max:mean", "max:stride", "max:none", "mean:stride", "stride:none", "none:none_matched")
    return replace(experiment, comparisons=pairs)
