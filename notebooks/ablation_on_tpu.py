# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many models at once, on a TPU, a GPU or a CPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/ablation_on_tpu.ipynb)
#
# An ablation changes one thing at a time. It needs many models: sizes times seeds times learning rates. Here all models of one size
# are the *lanes* of one compiled program. cnnlib spreads them over all devices: the cores of a TPU, a GPU, or the cores of a CPU.
# You need not change any cell for this.

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
seeds = 32  # a kernel size; 4 are enough for a CPU
sizes = [1, 3, 5, 7]  # of the kernels
learning_rates = [0.01, 0.02]
epochs = 12
wandb = "off"  # or "online", with a key, or "offline": one W&B run a lane; it needs %pip install wandb
out = "runs/ablation_on_tpu"

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## The question as data
#
# An *arm* is one network with its static settings: one compiled program. A *lane* is one model that it trains: a seed and its
# hyperparameters, here the learning rate.

# %%
from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.spec.notation import parse_model
from cnnlib.config.sweep import points, product

arms = points(
    product(size=sizes),
    lambda size: Arm(
        f"kernel_{size}", parse_model(f"conv:8@{size} relu max:2 conv:16@{size} relu max:2 dense:classes")
    ),
)
experiment = Experiment(
    data=Data("mnist5k", validation=500),
    arms=tuple(arms),
    optim=Optim("adamw", schedule="one_cycle", learning_rate=tuple(learning_rates), weight_decay=(0.01,)),
    lanes=Lanes(seed=tuple(range(seeds))),
    epochs=epochs,
    batch_size=100,
)

# %% [markdown]
# ## How long it will take
#
# This cell prints programs, lanes and an estimated time. The estimate uses earlier measurements on this machine, or else a typical
# rate. On two cores of a CPU, 32 seeds take about 40 minutes and 4 seeds take five.

# %%
from rich.console import Console

from cnnlib.runs.plan import print_plan
from cnnlib.config.resolve import resolve

resolved = resolve(experiment)
print_plan(resolved, len({arm.program for arm in resolved}), Console(width=100, highlight=False))

# %% [markdown]
# ## Which device gets which lanes
#
# Every device gets the same number of lanes. Devices exchange nothing during training. If there are more devices than lanes (GPUs,
# TPUs), several devices share each lane's batches and add up their gradients.

# %%
from cnnlib.train.sharding import devices
from cnnlib.train.programs import spread_of

placed = spread_of(resolved[0], devices())
print(
    f"{placed.lanes} lanes of each arm on {len(placed.devices)} x {placed.devices[0].device_kind}: "
    f"{placed.lanes_a_device} each, a batch on {placed.shards}"
)

# %% [markdown]
# ## Run it
#
# With W&B, each lane is a W&B run, and this ablation is their group. If W&B fails or hangs, training goes on.

# %%
import contextlib
from pathlib import Path

from cnnlib.report.summary import ReportWriter
from cnnlib.runs.runner import run
from cnnlib.runs.terminal import LineWatcher
from cnnlib.tracking.wandb_copy import WandbCopy
from cnnlib.runs.callbacks import Watchers

watchers = [LineWatcher(Console()), ReportWriter(Path(out))]
with contextlib.ExitStack() as ends:
    if wandb != "off":
        watchers.append(WandbCopy(wandb, print))
        ends.push(lambda kind, *_: watchers[-1].close(0 if kind is None else 1))
    results = run(experiment, "ablation", Path(out), Watchers(watchers))

# %%
for arm in results.arms:
    print(
        f"{arm.name}: {len(arm.lanes)} lanes on {arm.devices} devices, {arm.lanes_at_a_time} at a time on each; "
        f"compiled in {arm.compile_seconds:.1f} s, trained in {arm.train_seconds_per_lane:.2f} s per lane"
    )

# %% [markdown]
# ## The results
#
# Each size reports the learning rate with the best mean validation accuracy. The test set is used once, at the end.

# %%
from IPython.display import Image, Markdown, display

display(Markdown((Path(out) / "table.md").read_text()))
Image(Path(out) / "accuracy.png", width=700)

# %%
from cnnlib.report.comparisons import differences

compared = differences(results)
for difference in compared:
    print(difference.sentence())

# %% [markdown]
# Which true difference would this number of seeds detect, at this spread, in four of five such ablations? For smaller differences,
# "no clear difference" says nothing: you need more seeds.

# %%
from cnnlib.stats.intervals import detectable_difference

for difference in compared:
    if difference.deviation:  # a few seeds may agree by chance, and then say nothing
        least = detectable_difference(difference.deviation, difference.n, comparisons=difference.comparisons)
        print(f"{difference.first} and {difference.second}: {100 * least:.2f} points with {difference.n} seeds")
