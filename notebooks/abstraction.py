# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What the layers see
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/abstraction.ipynb)
#
# Textbooks say that a convolutional net sees more abstract things layer by layer: strokes, then parts of digits, then digits. Here you
# train LeNet-5 and a full net and look inside: at filters, maps, the patches that excite each unit most, and the evidence for a class.
# You also measure how well a classifier can separate the classes after each layer. You ask both nets the same questions, and get
# numbers if possible.

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
seeds = 5  # of the nets whose layers are probed, 2 or more
epochs = 12

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## Two nets, trained in memory
#
# The nets train as in the experiment `fc_vs_conv`. You get one `Net` per seed, with its layers, their weights and its accuracy.

# %%
from cnnlib.config.schema import EXPERIMENTS
from cnnlib.config.overrides import override
from cnnlib.interpret.trained import train_models

changes = ["arms=lenet5,lenet_300_100", f"lanes.seed=0..{seeds - 1}", f"epochs={epochs}"]
nets, data = train_models(override(EXPERIMENTS.get("fc_vs_conv"), changes))
conv, full = nets["lenet5"][0], nets["lenet_300_100"][0]
for name, lanes in nets.items():
    print(
        f"{name}: {100 * sum(net.test_accuracy for net in lanes) / len(lanes):.1f} % on {len(data.test.y):,} test digits, mean of {len(lanes)} seeds"
    )

# %% [markdown]
# ## Filters of the first layer
#
# A convolution has few small filters. A full layer has one filter per unit, each as large as the image.

# %%
from matplotlib import pyplot

from cnnlib.interpret.patches import first_filters

for name, net in (("LeNet-5", conv), ("LeNet-300-100", full)):
    filters = first_filters(net)
    print(f"{name}: {len(filters)} filters of {filters.shape[1]}x{filters.shape[2]}")
    bound = abs(filters[:6]).max()
    figure, panels = pyplot.subplots(1, 6, figsize=(9, 1.8), layout="constrained")
    for panel, one in zip(panels, filters[..., 0]):
        panel.imshow(one, cmap="RdBu_r", vmin=-bound, vmax=bound)
        panel.axis("off")

# %% [markdown]
# ## One digit, layer by layer
#
# The second convolution has smaller maps than the first, and more of them. You see the first six of each. Maps of the first convolution
# still look like the digit. Maps of the second show where a feature is.

# %%
from cnnlib.interpret.activations import activations, receptive_field

digit = data.test.x[400:401]
first, second = 1, 4  # the ReLUs after the two convolutions
maps = dict(zip((first, second), activations(conv, digit, (first, second))))
for layer, found in maps.items():
    figure, panels = pyplot.subplots(1, 7, figsize=(9, 1.6), layout="constrained")
    panels[0].imshow(digit[0, ..., 0], cmap="gray_r")
    for panel, channel in zip(panels[1:], range(6)):
        panel.imshow(found[0, ..., channel], cmap="cividis")
    for panel in panels:
        panel.axis("off")
    middle = (found.shape[1] // 2, found.shape[2] // 2)
    seen = receptive_field(conv, layer, middle)
    print(
        f"{found.shape[-1]} maps of {found.shape[1]}x{found.shape[2]}; a unit sees {seen.bottom - seen.top}x{seen.right - seen.left} pixels"
    )

# %% [markdown]
# ## What excites a unit most
#
# Each row shows one unit's strongest patches, at most one per test digit, as large as the unit sees them. You see the first six units.
# If a row has fewer classes, its unit is closer to a class: a stroke is in all digits, a bend in some.

# %%
from cnnlib.interpret.patches import strongest_patches
from cnnlib.demos.abstraction import mosaic

for layer, name in ((first, "first"), (second, "second")):
    patches = strongest_patches(conv, data.test.x, layer, count=8)
    _, count, height, width, _ = patches.pixels.shape
    figure, panel = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    panel.imshow(mosaic(patches.pixels[:6, ..., 0].reshape(-1, height, width), columns=count), cmap="gray")
    panel.axis("off")
    alive = patches.values[:, -1] > 0
    classes = [len(set(data.test.y[row].tolist())) for row in patches.examples[alive]]
    print(
        f"{name} convolution: the {count} digits of a unit are of {sum(classes) / len(classes):.1f} classes, "
        f"on average over {len(classes)} units; {(~alive).sum()} are silent"
    )

# %% [markdown]
# ## Evidence for a class
#
# Grad-CAM weights each of the last maps by how much it raises the class's score. A full net has no maps, so for it we multiply each pixel
# by its gradient. These are two different methods. They show where a net looks, not why it is right.

# %%
from cnnlib.interpret.evidence import class_evidence

figure, panels = pyplot.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
label = int(data.test.y[400])
panels[0].imshow(digit[0, ..., 0], cmap="gray_r")
panels[0].set_title(f"a {label}", fontsize=9)
panels[1].imshow(class_evidence(conv, digit[0], label), cmap="cividis")
panels[1].set_title("convolutional: Grad-CAM", fontsize=9)
evidence = class_evidence(full, digit[0], label)
panels[2].imshow(evidence, cmap="RdBu_r", vmin=-abs(evidence).max(), vmax=abs(evidence).max())
panels[2].set_title("full: gradient x input", fontsize=9)
for panel in panels:
    panel.axis("off")

# %% [markdown]
# ## How well can a linear classifier separate the classes?
#
# A linear classifier gets the outputs of one layer. It is fitted on training digits, its penalty is chosen on validation digits, and it is
# scored on test digits. On pixels it does all the work. In both nets the first layer does most of it instead. The second convolution
# adds some more. Dense layers and the last outputs add little or nothing. The number before a layer is its place in the net. The
# intervals are 95 % intervals of Student's t over the seeds.

# %%
from cnnlib.interpret.probes import linear_probes
from cnnlib.demos.abstraction import steps
from cnnlib.stats.intervals import mean_interval

(pixels,) = linear_probes(conv, data, (None,))
print(f"pixels: {100 * pixels.accuracy:.1f} %")
for name, lanes in nets.items():
    probed = [linear_probes(net, data, steps(net.model)) for net in lanes]
    for probes in zip(*probed):
        mean, low, high, n = mean_interval([100 * probe.accuracy for probe in probes])
        print(
            f"{name}, after {probes[0].name:12} {probes[0].features:5,} features: {mean:.1f} % [{low:.1f}, {high:.1f}] (95 %, t, n = {n})"
        )

# %% [markdown]
# ## Lines, again
#
# Hubel and Wiesel found cells in the visual cortex that respond to bars of one orientation. Do first-layer units do the same? A unit has
# selectivity 1 if it responds to a single orientation. It has 0 if it responds alike to all bars; its preferred angle then means nothing.

# %%
import numpy as np

from cnnlib.interpret.tuning import orientation_tuning
from cnnlib.demos import DEMOS

tuned = orientation_tuning(conv, np.arange(0, 180, 15))
for unit, (preferred, selectivity) in enumerate(zip(tuned.preferred, tuned.selectivity)):
    print(f"unit {unit}: prefers bars at {preferred:.0f} degrees, selectivity {selectivity:.2f}")

# %% [markdown]
# These nets were trained on digits. Nets that were trained to distinguish lines have more reason to prefer orientations. Here they are
# beside untrained filters:

# %%
print(DEMOS.get("tuning").look)
figure = DEMOS.get("tuning").draw()
