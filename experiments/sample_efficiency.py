"""How many examples is a convolution worth: accuracy against the size of the training set?

Question: how many digits do conv, local and full connectivity of one net need for the same accuracy? Each trains for
    the same number of steps on 100 to 3,200 digits, drawn anew for each seed.
Command: cnnlib run sample_efficiency
Expected: conv is ahead of local, and local ahead of full, at every size. Gaps are largest with few examples. The full
    net needs two to four times as many examples as the convolution.
Cost: about 5 minutes on 2 CPU cores.
    The peak of the learning rate is chosen per connectivity from 0.001, 0.003, 0.01 and 0.03, by validation accuracy at
    400 digits with three other seeds: 0.03 (conv 87.7 %, local 87.0 %) and 0.003 (full 85.5 %).
Source: the sample sizes of the theory in Lahoti et al. (arXiv 2403.15707, see the experiment dsd), applied to digits.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.config.sweep import points, product
from cnnlib.data.declaration import Data
from cnnlib.spec.layers import READINGS
from cnnlib.spec.notation import parse_model

STEPS, BATCH = 640, 50
SIZES = (100, 200, 400, 800, 1600, 3200)
PEAKS = {"conv": 0.03, "local": 0.03, "full": 0.003}


@EXPERIMENTS.register
def sample_efficiency() -> Experiment:
    net = parse_model("conv:6@5/2 relu conv:12@5/2 relu dense:classes")
    return Experiment(
        data=Data("mnist5k", validation=500),
        arms=points(
            product(reading=READINGS, size=SIZES),
            lambda reading, size: Arm(
                f"{reading}_{size}",
                net,
                reading,
                own=(
                    f"optim.learning_rate={PEAKS[reading]}",
                    f"data.train={size}",
                    f"passes={max(1, 1600 // size)}",
                    f"epochs={STEPS * BATCH // max(size, 1600)}",
                ),
            ),
        ),
        comparisons=tuple(f"conv_{size}:{other}_{size}" for other in ("local", "full") for size in SIZES),
        optim=Optim("adamw", schedule="one_cycle", weight_decay=(0.01,)),
        lanes=Lanes(seed=(0, 1, 2, 3, 4)),
        batch_size=BATCH,
    )
