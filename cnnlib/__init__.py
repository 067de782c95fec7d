"""cnnlib: full, local and convolutional networks, measured side by side."""

import os
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def avoid_wrong_products() -> None:
    """Keeps a JAX whose dense products may be wrong from computing them so, before it starts.

    On an AMD EPYC (Zen 3: AVX2, no AVX-512) jaxlib 0.7.2 and 0.8.0 give wrong numbers for up to half of the matrix
    products of 250x784 by 784x300, with nothing but JAX in the program; not so without XNNPACK, which they compute them
    with, and not with 0.8.3. Other processors were not tried. A choice in `XLA_FLAGS` stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    try:
        numbers = [int(part) for part in version("jaxlib").split(".")[:3] if part.isdecimal()]
    except PackageNotFoundError:  # what needs no JAX runs without it
        return
    if numbers < [0, 8, 3] and "xnnpack" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_xnnpack=false".strip()


avoid_wrong_products()
