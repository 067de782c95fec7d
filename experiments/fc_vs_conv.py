"""Does a convolutional net beat fully connected ones on digits, and is it the parameters?

Question: LeCun's table of 1998 sets LeNet-300-100 against LeNet-5. How far apart are they with the same data, training
rule and number of epochs, and does a full net of LeNet-5's size explain the difference?
"""

from cnnlib.architectures import lenet5, lenet_300_100, mlp_75_33
from cnnlib.config import EXPERIMENTS, Arm, Data, Experiment, Lanes, Optim


@EXPERIMENTS.register
def fc_vs_conv() -> Experiment:
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=(Arm("lenet_300_100", lenet_300_100()), Arm("mlp_75_33", mlp_75_33()), Arm("lenet5", lenet5())),
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.01,), weight_decay=(0.01,)),
        lanes=Lanes(seed=(0, 1, 2, 3, 4)),
        epochs=12,
        batch_size=100,
    )
