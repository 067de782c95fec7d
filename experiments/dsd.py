"""How does the number of examples that a net needs grow with the size of its input, and does theory agree?

Question: a signal of d numbers hides in one of k patches. Theory says that a convolution needs about k + d examples, a
    local layer k d, a full one k^2 d. What are the exponents of k and of d for trained nets?
Command: cnnlib run dsd
Expected: the exponents of k have the order of the theory: conv below local below full. Those of d are near 1 or below.
    The theory bounds what is enough in the worst case, so lower exponents do not contradict it.
Cost: about 5 minutes on 2 CPU cores, most of it compiling.
Source: Lahoti, Karp, Winston, Singh and Li, "Role of locality and weight sharing in image-based tasks", ICLR 2024
    (arXiv 2403.15707). Their nets have a special activation. These nets have one layer of 8 maps, ReLU and a mean.
"""

from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.config.sweep import points, product
from cnnlib.data.declaration import Data
from cnnlib.spec.layers import READINGS
from cnnlib.spec.notation import parse_model

STEPS, BATCH, EPOCHS = 1024, 16, 4
SIZES = (16, 64, 256, 1024, 4096)
TASKS = ((6, 8), (8, 8), (12, 8), (16, 8), (8, 4), (8, 16))


@EXPERIMENTS.register
def dsd() -> Experiment:
    return Experiment(
        data=Data("dsd_4x8"),
        arms=points(
            product(task=TASKS, reading=READINGS, size=SIZES),
            lambda task, reading, size: Arm(
                f"{reading}_k{task[0]}_d{task[1]}_n{size}",
                parse_model(f"conv:8@{task[1]}/{task[1]}:valid relu avg:{task[0]} dense:classes"),
                reading,
                own=(
                    f"data.name=dsd_{task[0]}x{task[1]}",
                    f"data.train={size}",
                    f"passes={STEPS * BATCH // size // EPOCHS}",
                ),
            ),
        ),
        optim=Optim("adam", learning_rate=(0.01,)),
        lanes=Lanes(seed=tuple(range(10))),
        epochs=EPOCHS,
        batch_size=BATCH,
    )
