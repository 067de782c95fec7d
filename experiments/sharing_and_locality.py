"""What are weight sharing and locality worth: the same nodes, parameters or multiply-adds, joined in three ways?

Question: how accurate is LeNet-5 as it is, without weight sharing (local), and also without locality (full)? All three
    have the same nodes in every layer. The full net then has 91 times the parameters, so we also compare at equal
    parameters and at equal multiply-adds. A full net cannot be as small as LeNet-5: its first layer alone has 784 x 784
    weights. So the common budget is that of the full net with a sixth of LeNet-5's widths.
Command: cnnlib run sharing_and_locality
    (on other data: data.name=cifar10; one chosen peak per arm: optim.learning_rate=0.002,0.005,0.01,0.02)
Expected: with 3,500 digits LeNet-5 about 97.3 %, local 96.5, full 95.1. At equal parameters and at equal multiply-adds
    the order is the same: conv is about 1 point ahead of local, and local about 2 ahead of full, with intervals apart.
    So neither parameters nor multiply-adds explain the gain of a convolution. Five seeds are too few to separate conv
    and local in every pair. No local or full net becomes a convolution: `distance_from_conv` in results.json is 0 for
    a convolution. It stays above 0.99, as for random weights.
Cost: about 3 minutes on 2 CPU cores.
Source: Neyshabur, "Towards learning convolutions from scratch", 2020 (arXiv 2007.13657), table 1, compares conv, local
    and full connectivity of one net, without seeds, intervals or equal budgets. Training as in fc_vs_conv, except for
    the peak of the learning rate. We tried 0.002, 0.005, 0.01 and 0.02 with two other seeds. 0.005 and 0.02 have the
    best validation accuracy, averaged over the arms (95.6 %). Of these, 0.005 is nearer to the full net's best peak.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.spec.architectures import lenet5
from cnnlib.spec.budget import scaled


@EXPERIMENTS.register
def sharing_and_locality() -> Experiment:
    net = lenet5()
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=(
            Arm("conv", net, "conv"),
            Arm("local", net, "local"),
            Arm("full", net, "full"),
            Arm("conv_parameters", net, "conv", match="parameters:full_sixth"),
            Arm("local_parameters", net, "local", match="parameters:full_sixth"),
            Arm("conv_macs", net, "conv", match="macs:full_sixth"),
            Arm("local_macs", net, "local", match="macs:full_sixth"),
            Arm("full_sixth", scaled(net, 1 / 6), "full"),
        ),
        comparisons=(
            "conv:local",
            "local:full",
            "conv_parameters:local_parameters",
            "local_parameters:full_sixth",
            "conv_macs:local_macs",
            "local_macs:full_sixth",
        ),
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.005,), weight_decay=(0.01,)),
        lanes=Lanes(seed=(0, 1, 2, 3, 4)),
        epochs=12,
        batch_size=100,
    )
