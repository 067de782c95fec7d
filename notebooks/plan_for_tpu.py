# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Plan a sweep for a TPU without a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/plan_for_tpu.ipynb)
#
# A free CPU runtime is enough to plan a sweep for a TPU v5e with eight chips. The compiler for TPUs, libtpu, runs on any
# machine. It says whether each model fits the memory, and how many cycles a training step takes. Nothing is trained here: all times are estimates.

# %%
# In Colab this installs cnnlib, and leaves Colab's JAX, which knows its GPU or TPU, as it is.
import importlib.util
import subprocess
import sys
from importlib.metadata import version

if importlib.util.find_spec("cnnlib") is None:
    kept = [f"{name}=={version(name)}" for name in ("jax", "jaxlib", "numpy")]
    source = "cnnlib[report] @ git+https://github.com/cnnlib/cnnlib"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *kept, source], check=True)

# %% tags=["parameters"]
hardware = "tpu:v5e:2x4"  # or tpu:v6e:2x4, tpu:v5p:2x2x1
seeds = 64  # per kernel size
sizes = [1, 3, 5, 7]  # of the kernels
epochs = 50

# %%
from cnnlib.aot.hardware import parse_target, set_environment

set_environment()  # before JAX looks for a TPU

from cnnlib.train.sharding import use_cores

use_cores()

import jax

print(jax.devices())

# %% [markdown]
# ## The compiler
#
# libtpu belongs to one version of JAX. This cell installs it for your version.

# %%
if importlib.util.find_spec("libtpu") is None:
    wanted = f"jax[tpu]=={version('jax')}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# %% [markdown]
# ## The sweep as data
#
# An *arm* is a network with its static settings. It has one compiled program. Its *lanes* are models that differ only in seed and
# hyperparameters, here in their seeds. The same experiment runs unchanged on the TPU: `cnnlib.runs.runner.run(experiment, ...)`.

# %%
from cnnlib.config.schema import Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.config.resolve import resolve
from cnnlib.spec.notation import parse_model

experiment = Experiment(
    data=Data("mnist5k", validation=500),
    arms=tuple(
        Arm(f"kernel_{size}", parse_model(f"conv:8@{size} relu max:2 conv:16@{size} relu max:2 dense:classes"))
        for size in sizes
    ),
    optim=Optim("adamw", schedule="one_cycle", learning_rate=(0.02,), weight_decay=(0.01,)),
    lanes=Lanes(seed=tuple(range(seeds))),
    epochs=epochs,
    batch_size=100,
)
arms = resolve(experiment)

# %% [markdown]
# ## What it would take
#
# This cell compiles each arm's epoch for one chip. Each chip trains its share of the lanes, and chips exchange nothing.
# *cycles per lane-step*: of one chip, for one training step of one model. *of peak*: the share of the published peak.

# %%
from rich.console import Console

from cnnlib.runs.aot import print_reports, reports, seconds_text

target = parse_target(hardware)
found = list(reports(arms, target))
print_reports(found, target, Console(width=100, highlight=False))

# %% [markdown]
# ## Which arms take the time
#
# The left bars are seconds. The right bars show how much of the matrix unit's peak the multiply-adds use. If the share is low, a
# larger kernel costs less than its multiply-adds suggest.

# %%
import matplotlib.pyplot as plt

fits = [arm.plain() for arm in found if arm.plain()["compiles"]]
names = [arm["name"] for arm in fits]
figure, (times, shares) = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
times.barh(names, [arm["estimated_seconds"] for arm in fits])
times.set_xlabel(f"estimated seconds of training, {seeds} models")
shares.barh(names, [100 * arm["share_of_peak"] for arm in fits])
shares.set_xlabel("% of the published peak")
plt.show()

# %% [markdown]
# ## Is one chip enough?
#
# Here one chip trains all lanes of the same sweep.

# %%
kind = hardware.split(":")[1]
alone = [arm.plain() for arm in reports(arms, parse_target(f"tpu:{kind}"))]
for many, one in zip((arm.plain() for arm in found), alone, strict=True):
    if many["compiles"] and one["compiles"]:
        print(
            f"{one['name']}: {seconds_text(one['estimated_seconds'])} on one chip, "
            f"{seconds_text(many['estimated_seconds'])} on {many['devices']}"
        )

# %% [markdown]
# Add the time to compile, to evaluate after each epoch, and to start the runtime. `docs/accelerators.md` compares the compiler's
# estimates with published peaks. If you have a TPU, [ablation_on_tpu](ablation_on_tpu.ipynb) runs a sweep like this one.
