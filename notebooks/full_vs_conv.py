# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A full net against a convolutional one
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/full_vs_conv.ipynb)
#
# Counting says that a convolution costs less. Is it any good? Three nets learn to read 3,500 handwritten digits, several seeds
# each, all seeds of a net in one compiled program: LeNet-300-100, which is full; a smaller full net with as many parameters as
# LeNet-5; and LeNet-5, which convolves.

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
seeds = 5  # models a net: fewer are faster, and their intervals wider
epochs = 12
out = "runs/full_vs_conv"

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## The digits
#
# 5,000 of MNIST's, which come with a package: 1,000 of them are for testing, 500 for choosing numbers such as the learning rate,
# and 3,500 to learn from.

# %%
from matplotlib import pyplot

from cnnlib.config.schema import EXPERIMENTS
from cnnlib.config.overrides import override
from cnnlib.data.sets import load

experiment = override(EXPERIMENTS.get("fc_vs_conv"), [f"lanes.seed=0..{seeds - 1}", f"epochs={epochs}"])
data = load(experiment.data)
print(data.description.counts)
figure, panels = pyplot.subplots(2, 10, figsize=(9, 2.2), layout="constrained")
for panel, image, label in zip(panels.flat, data.train.x, data.train.y):
    panel.imshow(image, cmap="gray_r")
    panel.set_title(int(label), fontsize=9)
    panel.axis("off")

# %% [markdown]
# ## The nets
#
# A net is a list of layers. `conv:6@5:2` is a convolution with 6 features, windows of 5x5 and 2 zeros of padding around; `max:2` takes
# the largest of each 2x2 block; `dense:120` joins everything to 120 units. A multiply-add is one product and one sum.

# %%
from cnnlib.config.resolve import resolve

for arm in resolve(experiment):
    print(f"{arm.name:14} {arm.count.parameters:>8,} parameters, {arm.count.macs:>8,} multiply-adds")
    print(f"               {arm.model}")

# %% [markdown]
# ## Training
#
# An *arm* is one net, and one compiled program; a *lane* is one model in it, with a seed of its own. Lanes are spread over the
# devices. The run is written to a folder, as it would be by `cnnlib run fc_vs_conv`.

# %%
from pathlib import Path

from rich.console import Console

from cnnlib.report.summary import ReportWriter
from cnnlib.runs.runner import run
from cnnlib.runs.terminal import LineWatcher
from cnnlib.runs.callbacks import Watchers

watchers = Watchers([LineWatcher(Console()), ReportWriter(Path(out))])
results = run(experiment, "fc_vs_conv", Path(out), watchers)
models = sum(len(arm["lanes"]) for arm in results["arms"])
print(
    f"{models} models in {results['wall_seconds']:.0f} s, compilation included, on {results['device']['count']} x {results['device']['kind']}"
)

# %%
from IPython.display import Image, Markdown, display

display(Markdown((Path(out) / "table.md").read_text()))
Image(Path(out) / "accuracy.png", width=700)

# %% [markdown]
# LeNet-5 is ahead of a full net with more than four times its parameters, and a full net of its own size is no better than the large
# one: it is not the number of parameters. It pays in multiply-adds, since each shared weight is used many times.
#
# ## Is it chance?
#
# Another seed gives another accuracy. So each net has several, and arms are compared seed by seed. The intervals hold for all
# comparisons together; where one holds zero, the difference is undecided, and with few seeds that is what honest intervals say.

# %%
from cnnlib.report.comparisons import differences

for difference in differences(results):
    print(difference.sentence())

# %% [markdown]
# ## While they learn
#
# Accuracy on the 500 digits that are kept aside, after every epoch: a line a net, its band the 95 % interval, faint lines the seeds.

# %%
import json

import altair

from cnnlib.report.charts import curve_points, curves_chart

lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
names = [arm["name"] for arm in results["arms"]]
curves = curve_points(lines, names, "validation_accuracy", most_epochs=100)
altair.Chart.from_dict(curves_chart(curves, "validation accuracy")).properties(width=600)

# %% [markdown]
# ## What they get wrong
#
# `report` makes one page of a run, with all of this, what each net takes for what, and its worst mistakes; it opens in any browser
# (in Colab, the list of files at the left has it to download).

# %%
from cnnlib.cli.main import main

status = main(["report", out, "--out", f"{out}/report.html"])
