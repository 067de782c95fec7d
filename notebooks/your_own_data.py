# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own images
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/your_own_data.ipynb)
#
# You need a folder of images with one subfolder per class. cnnlib turns it into a data set of TensorFlow Datasets, without
# TensorFlow. Experiments on images then use it by its name. Put your folder into the cell below. If you have none, the notebook
# draws strokes in three directions.

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
images = ""  # a folder with train/CLASS/*.png and test/CLASS/*.png, or only CLASS/*.png; empty: draw some
size = None  # (height, width) to which images are scaled; None: they are of one size already
grey = False
seeds = 5
epochs = 10
work = "runs/your_own_data"

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## The images
#
# This cell takes the place of your images. It draws only if `images` is empty.

# %%
from pathlib import Path

import numpy as np
from PIL import Image

from cnnlib.data.sets import LINE_CLASSES, make_lines

folder = Path(images) if images else Path(work) / "images"
if not images:
    drawn = make_lines(np.random.RandomState(7), count=1500, side=28)
    for index, (pixels, label) in enumerate(zip(*drawn)):
        place = folder / LINE_CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(place / f"{index:04}.png")
    grey = True
print(*sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))

# %% [markdown]
# ## A data set with a name
#
# If there are no folders `train` and `test`, cnnlib keeps a fifth of each class for testing, always the same fifth.

# %%
from cnnlib.data.image_folder import from_folder

data_dir = Path(work) / "data"
print(from_folder(folder, "my_images", data_dir, size=size, grey=grey))

# %%
from matplotlib import pyplot

from cnnlib.data.declaration import Data
from cnnlib.data.sets import load

data = load(Data("my_images", data_dir=str(data_dir)))
known = data.description
print(known.class_names, known.input_shape, known.counts)
figure, panels = pyplot.subplots(1, 8, figsize=(9, 1.6), layout="constrained")
for panel, image, label in zip(panels, data.train.x, data.train.y):
    panel.imshow(image, cmap="gray_r")
    panel.set_title(known.class_names[label], fontsize=8)
    panel.axis("off")

# %% [markdown]
# ## Any experiment on it
#
# This cell does the same as `cnnlib run fc_vs_conv data.name=my_images data.data_dir=...` in a terminal. It compares two full nets
# with LeNet-5. A tenth of the training images is used for validation.

# %%
from dataclasses import replace

from rich.console import Console

from cnnlib.config.schema import EXPERIMENTS, Arm, Lanes
from cnnlib.config.overrides import override
from cnnlib.report.summary import ReportWriter
from cnnlib.runs.runner import run
from cnnlib.runs.terminal import LineWatcher
from cnnlib.runs.callbacks import Watchers

experiment = override(
    EXPERIMENTS.get("fc_vs_conv"),
    [
        "data.name=my_images",
        f"data.data_dir={data_dir}",
        f"data.validation={known.counts['train'] // 10}",
        f"lanes.seed=0..{seeds - 1}",
        f"epochs={epochs}",
        f"batch_size={min(100, known.counts['train'] // 5)}",
    ],
)
out = Path(work) / "run"
results = run(experiment, "fc_vs_conv", out, Watchers([LineWatcher(Console()), ReportWriter(out)]))

# %%
from IPython.display import Image as Picture
from IPython.display import Markdown, display

display(Markdown((out / "table.md").read_text()))
Picture(out / "accuracy.png", width=700)

# %%
from cnnlib.report.comparisons import differences

for difference in differences(results):
    print(difference.sentence())

# %% [markdown]
# ## A net of your own
#
# Write a net in the short notation (see `full_vs_conv`). One seed shows whether it learns at all, but gives no interval.

# %%
from cnnlib.spec.notation import parse_model

net = parse_model("conv:8@3 relu max:2 conv:16@3 relu max:2 dense:classes")
small = replace(experiment, arms=(Arm("own_net", net),), lanes=Lanes(seed=(0,)))
out = Path(work) / "own_net"
result = run(small, "own_net", out, Watchers([LineWatcher(Console()), ReportWriter(out)]))
display(Markdown((out / "table.md").read_text()))
