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
# A filter is a small table of weights. Laid on a piece of the image, its weights and the pixels under them are multiplied and
# summed: one number. Slid over the whole image it gives a number a place, a *feature map*: bright where the image has what the
# filter looks for. Here you slide one by hand, then many at once, and see that it is one product of matrices.

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
# Four pixels under the filter, four products, one sum, one cell of the map. On a side of n pixels a filter of k has n - k + 1 places:
# of 4 and 2, 3.

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
# A line filter weighs the pixels on its line up, by 2 in 3x3, and those beside it down, by 1: together 0, so that flat areas, bright or
# dark, give 0. On a line of its own orientation it gives 3 x 2 = 6, on a single line of another, through its middle, 0.

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
# Four filters on one drawing: four maps, each bright along the lines of its own orientation.

# %%
print(DEMOS.get("filters").look)
figure = DEMOS.get("filters").draw()
# %% [markdown]
# ## One product of matrices
#
# Write every window as a row and every filter as a column. Their product holds all maps. Sliding gives the same, to the last digits:

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
# A full layer could do this too: its matrix has a row a place of the map and a column a pixel. It would hold the filter's 9 numbers in
# every row, shifted, and zeros elsewhere.

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
# And this is what a net's convolutional layer computes. (TPUs and GPUs round products unless they are asked not to.)

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
