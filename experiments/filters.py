"""How many different filters does the first layer need?

Question: how does accuracy change with 1 to 32 filters in the first layer, if all else stays the same?
Command: cnnlib run filters
Expected: a net with one filter works, and each doubling gains less. From 8 on ten seeds show no clear difference.
Cost: about 2 minutes on 2 CPU cores.
Source: the article's single small filter that slides over the image; training as in fc_vs_conv.
"""

import itertools
from dataclasses import replace

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.spec.notation import parse_model

from ._digits import on_digits

COUNTS = (1, 2, 4, 8, 16, 32)


@EXPERIMENTS.register
def filters() -> Experiment:
    experiment = on_digits(
        *(
            Arm(f"filters_{count}", parse_model(f"conv:{count}@5 relu max:2 conv:16@3 relu max:2 dense:classes"))
            for count in COUNTS
        )
    )
    pairs = tuple(f"filters_{more}:filters_{few}" for few, more in itertools.pairwise(COUNTS))
    return replace(experiment, comparisons=pairs)
