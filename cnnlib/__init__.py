"""cnnlib: full, local and convolutional networks, measured side by side."""

__version__ = "0.1.0"
