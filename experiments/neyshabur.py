"""Can a full net find convolutions by itself, and what is left of the order at equal budgets?

Question: Neyshabur's table compares conv, local and full connectivity of a shallow (S) and a deep net (D), one run
    each. Nodes are equal, so parameters are far apart. What are the differences over several seeds? What is left at the
    parameters and at the multiply-adds of the full net? Does beta-LASSO bring the full net nearer?
Command: cnnlib run neyshabur
    (as published but smaller, on CIFAR-10: data.name=cifar10 data.validation=5000 augment.shift=4 augment.flip=true)
Expected: on digits the order is conv, local, full for both nets. At equal budgets it is the same, with smaller gaps.
    beta-LASSO sets most of the full net's weights to 0. It gains little in so few epochs: the paper trained 4,000.
Cost: about 8 minutes on 2 CPU cores.
Source: Neyshabur, "Towards learning convolutions from scratch", 2020 (arXiv 2007.13657), table 1: 400 to 4,000 epochs
    on CIFAR-10 with heavy augmentation. Its full nets have 256M parameters. Here alpha is 4 (S) and 1 (D).
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.spec.architectures import neyshabur_d, neyshabur_s
from cnnlib.spec.layers import READINGS

PAIRS = (("conv", "local"), ("local", "full"), ("conv", "full"))
MEASURES = ("parameters", "macs")
EQUAL = {by: (("conv", f"local_{by}"), ("local", "full"), ("conv", "full")) for by in MEASURES}
LASSO = ("optim.l1=0.00001", "optim.l1_threshold=50")


@EXPERIMENTS.register
def neyshabur() -> Experiment:
    arms = []
    for name, net in (("s", neyshabur_s(4)), ("d", neyshabur_d(1))):
        arms += [Arm(f"{name}_{reading}", net, reading) for reading in READINGS]
        for measure in MEASURES:
            for reading in ("conv", "local"):
                budget = f"{measure}:{name}_full"
                arms.append(Arm(f"{name}_{reading}_{measure}", net, reading, match=budget))
    arms.append(Arm("s_full_lasso", neyshabur_s(4), "full", own=LASSO))
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=tuple(arms),
        comparisons=(
            *(f"{net}_{first}:{net}_{second}" for net in "sd" for first, second in PAIRS),
            *(f"{net}_{first}_{by}:{net}_{second}" for net in "sd" for by in MEASURES for first, second in EQUAL[by]),
            "s_full_lasso:s_full",
        ),
        optim=Optim("sgd", schedule="cosine", learning_rate=(0.05,)),
        lanes=Lanes(seed=(0, 1, 2, 3, 4)),
        epochs=12,
        batch_size=100,
    )
