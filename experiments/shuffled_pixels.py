"""Does one fixed permutation of the pixels take a convolution's advantage away?

Question: a full net treats every order of its inputs alike. A convolution assumes that neighbours belong together. If
    one permutation reorders the pixels of all images, does the full net stay inside its interval, and does the
    convolution lose its advantage?
Command: cnnlib run shuffled_pixels
Expected: LeNet-300-100 stays the same. LeNet-5 is ahead of it on images, and behind or level on shuffled ones.
Cost: about 2 minutes on 2 CPU cores.
Source: the argument of Greydanus and Kobak (arXiv 2011.14439) for signals, on digits; training as in fc_vs_conv.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.spec.architectures import lenet5, lenet_300_100

SHUFFLED = ("data.shuffle_pixels=0",)


@EXPERIMENTS.register
def shuffled_pixels() -> Experiment:
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=(
            Arm("full", lenet_300_100()),
            Arm("conv", lenet5()),
            Arm("full_shuffled", lenet_300_100(), own=SHUFFLED),
            Arm("conv_shuffled", lenet5(), own=SHUFFLED),
        ),
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.02,), weight_decay=(0.01,)),
        lanes=Lanes(seed=tuple(range(10))),
        epochs=12,
        batch_size=100,
    )
