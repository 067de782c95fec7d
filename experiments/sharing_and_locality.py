"""What are weight sharing and locality worth: the same nodes, parameters or multiply-adds, joined in three ways?

Question: TODO
Command: python -m experiments run sharing_and_locality
Expected: TODO
Cost: TODO
Source: TODO
"""

from cnnlib.architectures import lenet5
from cnnlib.budget import scaled
from cnnlib.config import EXPERIMENTS, Arm, Data, Experiment, Lanes, Optim


@EXPERIMENTS.register
def sharing_and_locality() -> Experiment:
    net = lenet5()
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=(
            Arm("conv", net),
            Arm("local", net, "local"),
            Arm("full", net, "full"),
            Arm("full_sixth", scaled(net, 1 / 6), "full"),
            Arm("local_parameters", net, "local", match="parameters:full_sixth"),
            Arm("conv_parameters", net, match="parameters:full_sixth"),
            Arm("local_macs", net, "local", match="macs:full_sixth"),
            Arm("conv_macs", net, match="macs:full_sixth"),
        ),
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.02,), weight_decay=(0.01,)),
        lanes=Lanes(seed=(0, 1, 2, 3, 4)),
        epochs=12,
        batch_size=100,
    )
