"""What the ablations on digits share: the data, the training rule, the seeds."""

from cnnlib.config.schema import Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data

EPOCHS, SEEDS = 12, tuple(range(10))


def on_digits(*arms: Arm) -> Experiment:
    """Return an experiment that trains arms as fc_vs_conv does. Each has ten seeds; pairs are compared seed by seed."""
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=arms,
        # The peak of fc_vs_conv. It was chosen there for other nets on the same digits.
        optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.02,), weight_decay=(0.01,)),
        lanes=Lanes(seed=SEEDS),
        epochs=EPOCHS,
        batch_size=100,
    )
