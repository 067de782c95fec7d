"""Does a convolutional net beat fully connected ones on digits, and is it the parameters?

Question: LeCun's table of 1998 compares LeNet-300-100 with LeNet-5. How far apart are they with the same data, training
    rule and number of epochs? Does a full net of LeNet-5's size (mlp_75_33) explain the difference?
Command: cnnlib run fc_vs_conv
Expected: LeNet-5 about 97.5 %, LeNet-300-100 and mlp_75_33 about 94.5 %, on 1,000 test digits after training on 3,500.
    LeNet-5 is ahead by more than 2 points with 0.23 of LeNet-300-100's parameters. The intervals do not overlap.
    LeCun's errors of 0.95 % and 3.05 % took 60,000 examples. With so few, all nets are far from them.
Cost: under a minute on 2 CPU cores, compilation included.
Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 86(11),
    1998, section III. Ours are today's versions of its nets: ReLU, max pooling, softmax. AdamW has a one-cycle learning
    rate. Its peak is the same for all arms and was chosen on the 500 validation digits.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.spec.architectures import lenet5, lenet_300_100, mlp_75_33


@EXPERIMENTS.register
def fc_vs_conv() -> Experiment:
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=(Arm("lenet_300_100", lenet_300_100()), Arm("mlp_75_33", mlp_75_33()), Arm("lenet5", lenet5())),
        # Of 0.003, 0.005, 0.01, 0.015, 0.02, 0.03 this peak has the best validation accuracy, averaged over the arms.
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.02,), weight_decay=(0.01,)),
        lanes=Lanes(seed=(0, 1, 2, 3, 4)),
        epochs=12,
        batch_size=100,
    )
