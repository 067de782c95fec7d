"""What do shifted images teach, and whom?

Question: how does accuracy change with training images shifted at random by 0 to 3 pixels, and with mirrored ones, for
    a convolutional and a full net? Real digits are never mirrored.
Command: cnnlib run augmentation
Expected: shifts of 1 to 2 pixels help both nets. They help the full net more, since nothing else tells it that a digit
    may move. Mirroring hurts both.
Cost: about 2 minutes on 2 CPU cores.
Source: a classic ablation; training as in fc_vs_conv.
"""

from dataclasses import replace

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.config.sweep import points, product
from cnnlib.spec.architectures import lenet5, lenet_300_100

from ._digits import on_digits

CHANGES = {"plain": (), "shift1": ("augment.shift=1",), "shift2": ("augment.shift=2",)}
CHANGES |= {"shift3": ("augment.shift=3",), "mirrored": ("augment.flip=true",)}


@EXPERIMENTS.register
def augmentation() -> Experiment:
    nets = {"conv": lenet5(), "full": lenet_300_100()}
    changed = [change for change in CHANGES if change != "plain"]
    pairs = [f"{net}_{change}:{net}_plain" for net in nets for change in changed]
    experiment = on_digits(
        *points(
            product(net=nets, change=CHANGES),
            lambda net, change: Arm(f"{net}_{change}", nets[net], own=CHANGES[change]),
        )
    )
    return replace(experiment, comparisons=("conv_plain:full_plain", *pairs))
