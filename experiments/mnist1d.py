"""Is a convolution's advantage on MNIST-1D its prior, and gone when the places of the signals are shuffled?

Question: the tables of the MNIST-1D paper compare a logistic regression, an MLP and a CNN with one seed each. They use
    the signals, and the same signals after one fixed permutation of their places. Do the tables hold with 30 seeds, and
    are the intervals apart?
Command: cnnlib run mnist1d
Expected: logistic 31 to 33 %, MLP 64 to 69, CNN at least 92.3. On shuffled places logistic and MLP stay the same, and
    the CNN is below the MLP. The paper's table has 32 / 68 / 94 and 32 / 68 / 56. Its notebook's last step has 31.5 /
    65 / 92.3 and 31.5 / 66 / 58.7.
Cost: under 10 minutes on 2 CPU cores.
Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", ICML 2024 (arXiv 2011.14439). Its protocol:
    Adam, learning rate 0.01, batches of 100 in one fixed order, 6,000 steps, no validation. Signals are normalised.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.spec.architectures import logistic, mnist1d_cnn, mnist1d_mlp

SHUFFLED = ("data.shuffle_pixels=0",)


@EXPERIMENTS.register
def mnist1d() -> Experiment:
    nets = {"logistic": logistic(), "mlp": mnist1d_mlp(), "cnn": mnist1d_cnn()}
    return Experiment(
        data=Data("mnist1d"),
        arms=(
            *(Arm(name, net) for name, net in nets.items()),
            *(Arm(f"{name}_shuffled", net, own=SHUFFLED) for name, net in nets.items()),
        ),
        comparisons=(
            "cnn:mlp",
            "mlp:logistic",
            "cnn:cnn_shuffled",
            "mlp:mlp_shuffled",
            "logistic:logistic_shuffled",
            "mlp_shuffled:cnn_shuffled",
        ),
        optim=Optim("adam", learning_rate=(0.01,)),
        lanes=Lanes(seed=tuple(range(30))),
        epochs=150,
        batch_size=100,
        reshuffle=False,
    )
