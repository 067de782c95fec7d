# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The border, and what pooling is good for
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/padding_and_pooling.ipynb)
#
# A window that must stay inside the image has fewer places than there are pixels, and sees the border less than the middle. Zeros
# around the image solve the first problem, and the second in part. Pooling makes the map smaller on purpose. It keeps the fact that
# a feature was present, and forgets the exact place. Below you measure how much of a small shift this hides, and whether it helps.

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
digits = 100  # that are shifted

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## The size of a map
#
# Without padding a map has n - k + 1 places per side, which is "slightly smaller". With zeros around the image it has n. In general,
# with stride s, it has floor((n + zeros - k) / s) + 1.

# %%
from cnnlib.demos.window_steps import share_on_padding, times_seen, window_for

for padding in ("VALID", "SAME"):
    for stride in (1, 2):
        window = window_for((28, 28), 5, strides=stride, padding=padding)
        zeros = sum(window.padding[0])
        print(
            f"28 pixels, {zeros} zeros, window 5, stride {stride}: {(28 + zeros - 5) // stride + 1} = {window.output_size[0]}"
        )

# %% [markdown]
# ## What the border loses
#
# How many windows see a pixel? With 5x5 windows, 25 see a pixel in the middle. One sees a corner without padding, and 9 with it.
# The price of padding is that some multiply-adds are spent on zeros.

# %%
for padding in ("VALID", "SAME"):
    window = window_for((28, 28), 5, padding=padding)
    seen = times_seen(window)
    print(
        f"{padding}: corner {seen[0, 0]}, middle {seen[14, 14]}; taps on padding {100 * share_on_padding(window):.1f} %"
    )

# %%
from cnnlib.demos import DEMOS

print(DEMOS.get("padding").look)
figure = DEMOS.get("padding").draw()
# %% [markdown]
# ## Pooling, block by block
#
# Max pooling keeps the maximum of each block. Blocks of 2x2 side by side reduce the map to a quarter. If the stride is smaller than
# the block, blocks overlap.

# %%
import numpy as np

from cnnlib.demos.window_steps import max_pool, pool_blocks

image = np.array([[1, 3, 0, 2], [0, 2, 5, 1], [4, 0, 1, 0], [1, 1, 0, 7]])
for block in pool_blocks(image, 2):
    print(f"block {block.place}: {block.values.tolist()} -> {block.largest:g}, from pixel {block.winner}")
print("side by side", max_pool(image, 2).tolist(), "overlapping", max_pool(image, 2, strides=1).tolist())

# %%
from IPython.display import HTML
from matplotlib import pyplot

film = HTML(DEMOS.get("pooling").draw().to_jshtml())
pyplot.close()
film

# %% [markdown]
# ## A small shift
#
# Move a digit by one pixel, and compare its feature map with the old one, place by place. A convolution's map moves along exactly, except
# at the border. This is *equivariance*. Pooled maps change less. A map that simply keeps every second pixel does not change less.

# %%
from cnnlib.demos.pooling import changes_of, maps_of, some_digits
from cnnlib.stats.intervals import mean_interval
from cnnlib.demos.window_steps import average_pool

readings = {
    "feature maps": maps_of,  # of four line filters, nothing below 0
    "every second pixel": lambda image: maps_of(image)[::2, ::2],
    "max pooling 2x2": lambda image: max_pool(maps_of(image), 2),
    "average pooling 2x2": lambda image: average_pool(maps_of(image), 2),
    "max pooling 4x4": lambda image: max_pool(maps_of(image), 4),
}
for name, function in readings.items():
    by_one_pixel = changes_of(function, some_digits(digits))[:, 0]
    mean, low, high, n = mean_interval(by_one_pixel)
    print(f"{name:20} change by {mean:.2f} of their norm [{low:.2f}, {high:.2f}] (95 %, Student's t, {n} digits)")

# %%
print(DEMOS.get("shifts").look)
figure = DEMOS.get("shifts").draw()
# %% [markdown]
# ## Does it help a net?
#
# Textbooks say that pooling saves computing and reduces overfitting. The experiment `pooling` trains one net with max pooling, mean
# pooling, a stride of 2 instead, or none, with ten seeds each. On 3,500 digits the gap between training and test accuracy is 2.8 points
# with max pooling, 2.9 with means, 4.6 with strides, 4.9 with none. Pooling by a maximum or a mean narrows the gap. A smaller map alone
# does not. Strides need the fewest multiply-adds of these four.
# [All results are here](https://github.com/cnnlib/cnnlib/blob/main/docs/RESULTS.md#pooling). This is the question, with its nets:

# %%
from cnnlib.cli.main import main

status = main(["show", "pooling"])
