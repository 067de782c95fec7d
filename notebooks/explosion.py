# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why not simply connect everything?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/explosion.ipynb)
#
# A full layer connects every node to every node and loses no information. But it is expensive: 3,072 x 3,072 connections for a
# 32x32 colour image, 10^12 for a grey image of 1000x1000. A convolution has a small window, and one set of weights for all
# places. Here you count exactly what that saves. You train nothing.

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
sides = [8, 16, 32, 64, 128, 256, 512, 1000, 2048, 4096]  # of the square input, in pixels

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## The numbers of the argument
#
# cnnlib computes exact counts from the sizes of a layer. It allocates nothing, so 10^12 connections take no memory.

# %%
from cnnlib.spec.counts import count
from cnnlib.spec.notation import parse_model

for text, shape in (
    ("dense:3072", (32, 32, 3)),
    ("dense:1000000", (1000, 1000, 1)),
    ("conv:3@3x3", (32, 32, 3)),
    ("conv:1@3x3", (1000, 1000, 1)),
):
    counted = count(parse_model(text), shape)
    print(f"{text:14} on {shape}: {counted.connections:>17,} connections, {counted.parameters:>17,} parameters")

# %% [markdown]
# The full layer has 9,437,184 connections for the 32x32 colour image, the convolution 82,944. For the grey image it is 10^12
# against 9,000,000. Parameters are the weights and one bias per feature, or per node if weights are not shared. The 3x3
# convolution of 3 features has 84 at any side.
#
# ## Two savings, not one
#
# A *local* layer is between the two: it has small windows, but its own weights at every place. So it separates the two savings.
# The small window saves connections, and sharing saves parameters.

# %%
layer = parse_model("conv:3@3x3")
for reading in (layer.full(), layer.local(), layer):
    counted = count(reading, (32, 32, 3))
    print(f"{reading.connectivity:5}: {counted.connections:>10,} connections, {counted.parameters:>10,} parameters")

# %% [markdown]
# ## Against the side of the image
#
# Both axes are logarithmic, so a power is a straight line. If the side doubles, the full layer has sixteen times the connections,
# the other two have four times. You can choose another window or more channels in the menus. Point at a mark for its exact number.

# %%
import altair

from cnnlib.report.charts import growth_chart, growth_points

points = growth_points(sides, windows=(1, 3, 5, 7), channels=(1, 3), features=(1, 3, 16))
altair.Chart.from_dict(growth_chart(points))

# %% [markdown]
# `cnnlib run explosion` draws the same picture:

# %%
from cnnlib.demos import DEMOS

print(DEMOS.get("explosion").look)
figure = DEMOS.get("explosion").draw()
# %% [markdown]
# ## A whole net
#
# One layer is not a net. This is LeNet-5 with each connectivity and the same nodes in every layer:

# %%
from rich.console import Console

from cnnlib.spec.architectures import lenet5
from cnnlib.report.counting import print_summary, summary

net = lenet5().with_num_classes(10)
for reading in (net.full(), net.local(), net):
    counted = count(reading, (28, 28, 1))
    print(f"{reading.connectivity:5}: {counted.connections:>10,} connections, {counted.parameters:>10,} parameters")
print_summary(summary(net, (28, 28, 1), batch_size=128, dtype="float32"), Console(width=100, highlight=False))
