# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Filters, and the maps they make
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/filters.ipynb)
#
# A filter is a small table of weights. Lay it on a piece of the image, multiply each weight by the pixel under it, and sum the
# products: one number. Slide it over the whole image and you get one number per place, a *feature map*. The map is bright where the
# image has what the filter looks for. Here you slide one filter by hand, then many at once. You see that this is one matrix product.

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
kind = "vertical"  # of the line filter in the second part: vertical, horizontal, diagonal or antidiagonal
seed = 0  # of the random images in the last

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## A 2x2 filter, step by step
#
# The filter covers four pixels. Four products and one sum give one cell of the map. On a side of n pixels a filter of side k has
# n - k + 1 places. For n = 4 and k = 2 these are 3.

# %%
import numpy as np

from cnnlib.demos.window_steps import slide, steps

image = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]])
kernel = np.array([[0, 1], [1, 0]])
for step in steps(image, kernel):
    terms = " + ".join(f"{a:g}x{b:g}" for a, b in zip(step.window.ravel(), kernel.ravel()))
    print(f"place {step.place}: {terms} = {step.total:g}")
print(slide(image, kernel))

# %%
from IPython.display import HTML
from matplotlib import pyplot

from cnnlib.demos import DEMOS

film = HTML(DEMOS.get("steps").draw().to_jshtml())
pyplot.close()
film

# %% [markdown]
# ## Lines
#
# A 3x3 line filter has weight 2 on its line and -1 beside it. The weights sum to 0, so flat areas give 0, whether bright or dark.
# On a line of its own orientation the filter gives 3 x 2 = 6. On a single line of another orientation through its middle it gives 0.

# %%
from cnnlib.demos.window_steps import LINE_FILTERS, line_filter, strokes

print(line_filter(kind))
through = {
    "vertical": ((0, 3), (6, 3)),
    "horizontal": ((3, 0), (3, 6)),
    "diagonal": ((0, 0), (6, 6)),
    "antidiagonal": ((6, 0), (0, 6)),
}
for other in LINE_FILTERS:
    print(
        f"{kind} filter in the middle of a line, {other}: {slide(strokes((7, 7), [through[other]]), line_filter(kind))[2, 2]:g}"
    )

# %% [markdown]
# Four filters on one drawing give four maps. Each map is bright along the lines of its filter's orientation.

# %%
print(DEMOS.get("filters").look)
figure = DEMOS.get("filters").draw()
# %% [markdown]
# ## One product of matrices
#
# Write every window as a row and every filter as a column. Their matrix product holds all maps. Sliding gives the same up to rounding:

# %%
from cnnlib.demos.window_steps import as_product, matrix_of

random = np.random.RandomState(seed)
image, kernels = random.normal(size=(9, 8)), random.normal(size=(3, 3, 5))
product = as_product(image, kernels)
print(f"windows {product.windows.shape} times filters {product.filters.shape} gives maps {product.maps.shape}")
slid = np.stack([slide(image, kernels[..., index]) for index in range(kernels.shape[-1])], axis=-1)
print(f"sliding and the product differ by {np.abs(slid - product.maps).max():.1e} at most")

# %% [markdown]
# ## A full layer with most weights 0, and the others shared
#
# A full layer could do this too. Its matrix has one row per place of the map and one column per pixel. Every row would hold the
# filter's 9 numbers, shifted, and zeros elsewhere.

# %%
matrix = matrix_of(kernels[..., 0], image.shape)
print(
    f"{matrix.shape[0]} x {matrix.shape[1]} weights, {np.count_nonzero(matrix)} not 0, {len(np.unique(matrix)) - 1} different ones"
)
print(
    f"the matrix and sliding differ by {np.abs((matrix @ image.ravel()).reshape(slid.shape[:2]) - slid[..., 0]).max():.1e} at most"
)
figure = DEMOS.get("product").draw()
# %% [markdown]
# A net's convolutional layer computes the same. (TPUs and GPUs round products unless you ask for the highest precision.)

# %%
import jax.numpy as jnp

from cnnlib.ops import conv2d

with jax.default_matmul_precision("highest"):
    layer = conv2d(
        jnp.asarray(image, jnp.float32)[None, :, :, None],
        jnp.asarray(kernels, jnp.float32)[:, :, None],
        padding="VALID",
    )
print(f"the layer and sliding differ by {np.abs(np.asarray(layer[0]) - slid).max():.1e} at most, in single precision")
