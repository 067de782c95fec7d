"""Can a net learn MNIST to 99 % in one look at each image?

Question: one epoch over all 60,000 training images, many seeds: is the mean accuracy 99 %?
Command: python -m experiments run mnist_one_epoch
    (reads mnist from TFDS's folder; it downloads and prepares it there at its first use, which needs TensorFlow)
Expected: 99.0 % or more, as train_mnist_fast reports: 99.04 +- 0.07 % over 30 seeds, with 215K parameters.
Cost: about 3 minutes on 2 CPU cores for 10 seeds.
Source: github.com/tuomaso/train_mnist_fast: batches of 256, one epoch.
"""

from cnnlib.config import EXPERIMENTS, Arm, Data, Experiment, Lanes, Optim
from cnnlib.spec import parse_model


@EXPERIMENTS.register
def mnist_one_epoch() -> Experiment:
    net = parse_model("conv:24@5 relu max:2 conv:32@3 relu max:2 dense:128 relu dense:classes")
    return Experiment(
        data=Data("mnist"),
        arms=(Arm("conv", net),),
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.01,), weight_decay=(0.01,)),
        lanes=Lanes(seed=tuple(range(10))),
        epochs=1,
        batch_size=128,
    )
