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
# Counts show that a convolution costs less. Is it accurate? You train three nets on 3,500 handwritten digits: LeNet-300-100, a full
# net; a smaller full net with as many parameters as LeNet-5; and LeNet-5, which convolves. Each net has several seeds. All seeds
# of a net train in one compiled program.

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
# A package brings 5,000 digits of MNIST: 3,500 for training, 500 for choosing hyperparameters such as the learning rate, and
# 1,000 for testing.

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
# A net is a list of layers. `conv:6@5:2` is a convolution with 6 features, windows of 5x5 and 2 zeros of padding on each side. `max:2`
# takes the maximum of each 2x2 block. `dense:120` connects everything to 120 units. A multiply-add is one product and one sum.

# %%
from cnnlib.config.resolve import resolve

for arm in resolve(experiment):
    print(f"{arm.name:14} {arm.count.parameters:>8,} parameters, {arm.count.macs:>8,} multiply-adds")
    print(f"               {arm.model}")

# %% [markdown]
# ## Training
#
# An *arm* is one net and one compiled program. A *lane* is one model in it, with its own seed. Lanes are spread over the devices.
# The run is written to a folder, as `cnnlib run fc_vs_conv` does.

# %%
from pathlib import Path

from rich.console import Console

from cnnlib.report.summary import ReportWriter
from cnnlib.runs.runner import run
from cnnlib.runs.terminal import LineWatcher
from cnnlib.runs.callbacks import Watchers

watchers = Watchers([LineWatcher(Console()), ReportWriter(Path(out))])
results = run(experiment, "fc_vs_conv", Path(out), watchers)
models = sum(len(arm.lanes) for arm in results.arms)
print(
    f"{models} models in {results.wall_seconds:.0f} s, compilation included, on {results.device.count} x {results.device.kind}"
)

# %%
from IPython.display import Image, Markdown, display

display(Markdown((Path(out) / "table.md").read_text()))
Image(Path(out) / "accuracy.png", width=700)

# %% [markdown]
# LeNet-5 is more accurate than a full net with more than four times its parameters. It is also more accurate than a full net of its
# own size, so the number of parameters does not explain it. LeNet-5 pays in multiply-adds, since each shared weight is used many times.
#
# ## Is it chance?
#
# Another seed gives another accuracy. So each net has several seeds, and arms are compared seed by seed. The intervals hold for all
# comparisons together. If an interval contains zero, there is no clear difference. With few seeds, this is to be expected.

# %%
from cnnlib.report.comparisons import differences

for difference in differences(results):
    print(difference.sentence())

# %% [markdown]
# ## While they learn
#
# The chart shows accuracy on the 500 validation digits after every epoch. Each net has one line, its band is the 95 % interval, and
# faint lines are the seeds.

# %%
import altair

from cnnlib.report.charts import curve_points, curves_chart
from cnnlib.runs.metrics import read_metrics

lines = read_metrics(Path(out) / "metrics.jsonl")
names = [arm.name for arm in results.arms]
curves = curve_points(lines, names, "validation_accuracy", most_epochs=100)
altair.Chart.from_dict(curves_chart(curves, "validation accuracy")).properties(width=600)

# %% [markdown]
# ## What they get wrong
#
# `report` makes one page of a run. It has all of the above, the classes that each net confuses, and its worst mistakes. The page opens
# in any browser. In Colab, download it from the list of files at the left.

# %%
from cnnlib.cli.main import main

status = main(["report", out, "--out", f"{out}/report.html"])
