# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convolution is overlap
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnnlib/cnnlib/blob/main/notebooks/overlap.ipynb)
#
# Take two functions. One stands still; the other is mirrored and slides over it. At each place, multiply them and take the
# area under the product. These areas, place by place, are their convolution. Here you watch it and compute it in two ways.
# Then you find it in a row of numbers and in a picture of the sky.

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
places = 45  # of the sliding function, from one end to the other

# %%
from cnnlib.train.sharding import use_cores

use_cores()  # each core of a CPU counts as a device; GPUs and TPUs stay as they are

import jax

print(jax.devices())

# %% [markdown]
# ## Watch it
#
# Red stands still and blue slides over it. The shaded area is the area under their product. The green curve plots that area at
# each place. Blue is mirrored: an exponential that falls to the right arrives with its steep side first.

# %%
from IPython.display import HTML
from matplotlib import pyplot

from cnnlib.demos import DEMOS
from cnnlib.demos.overlap import draw_overlap

animation = draw_overlap(places)
film = HTML(animation.to_jshtml())
pyplot.close()
film

# %% [markdown]
# ## Compute it
#
# The convolution is the integral of f(s) g(t - s) over s. `overlap` computes it numerically. `convolved` computes it in closed
# form, for any two of boxes, triangles, exponentials and Gaussians.

# %%
import numpy as np

from cnnlib.demos.sliding import Box, Exponential, Gaussian, Triangle, convolved, overlap

t = np.linspace(-4, 6, 101)
signals = [Box(1.5), Triangle(2.0, 0.3), Exponential(1.2), Gaussian(0.7, -0.2)]
worst = max(np.abs([overlap(f, g, at) for at in t] - convolved(f, g, t)).max() for f in signals for g in signals)
print(f"16 pairs, {len(t)} places each: the two ways differ by {worst:.1e} at most")

# %% [markdown]
# It does not matter which of the two slides: f * g = g * f. The area of the result is the product of the two areas.

# %%
f, g = Box(1.5), Exponential(1.2)
print(f"f * g - g * f, at most: {np.abs(convolved(f, g, t) - convolved(g, f, t)).max():.1e}")
fine = np.linspace(-2, 20, 20001)
print(f"area of f * g: {np.trapezoid(convolved(f, g, fine), fine):.4f}; of f times that of g: {1.5 * (1 / 1.2):.4f}")

# %% [markdown]
# ## A row of numbers: the flip
#
# With numbers instead of functions, the integral is a sum. A single 1 convolved with a kernel gives the kernel. If you slide the
# kernel without mirroring it, you compute a *correlation*, and the kernel comes out reversed. Nets correlate and call it
# convolution. They learn their kernels, so it makes no difference to them.

# %%
from cnnlib.demos.sliding import convolve, correlate

x, kernel = np.array([0.0, 0, 1, 0, 0]), np.array([1.0, 2, 4])
print("convolved ", convolve(x, kernel), " numpy:", np.convolve(x, kernel))
print("correlated", correlate(x, kernel), " numpy:", np.correlate(x, kernel, mode="full"))
figure = DEMOS.get("flip").draw()
# %% [markdown]
# A net's layer computes the correlation:

# %%
import jax.numpy as jnp

from cnnlib.ops import conv1d

layer = conv1d(jnp.asarray(x)[None, :, None], jnp.asarray(kernel)[:, None, None], padding=2)
print("a layer   ", layer[0, :, 0])

# %% [markdown]
# ## The sky: a dirty map
#
# A radio telescope does not see points. It sees each source as its *beam*: a bright spot with rings, as bright as the source. Where
# beams overlap, they add up. The *dirty map* that it draws is the clean map convolved with the beam.

# %%
figure = DEMOS.get("beam").draw()
# %%
from cnnlib.demos.sliding import dirty_map, point_sources

beam = np.exp(-(np.hypot(*np.meshgrid(np.arange(-4, 5), np.arange(-4, 5))) ** 2) / 4)
one, other = (point_sources((21, 21), [place], [1.0]) for place in ((8, 8), (12, 13)))
both = dirty_map(one + other, beam)
apart = dirty_map(one, beam) + dirty_map(other, beam)
print(f"brightest of one source: {dirty_map(one, beam).max():.2f}")
print(f"the map of two sources less the two maps, at most: {np.abs(both - apart).max():.1e}")
