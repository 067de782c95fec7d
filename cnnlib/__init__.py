"""cnnlib: full, local and convolutional networks, measured side by side."""

from cnnlib import defects

__version__ = "0.1.0"

defects.avoid()  # before JAX starts
