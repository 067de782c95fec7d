"""List known jaxlib defects, which give wrong numbers or crashes, and set the XLA flags that avoid them.

`import cnnlib` sets the flags that the installed jaxlib needs. Nothing here imports JAX.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

Version = tuple[int, ...]


class Defect(NamedTuple):
    """A defect of jaxlib. The version `first` has it, and so have all later versions before `fixed`."""

    name: str
    """Name of the program in `known_bad.py` that shows the defect."""
    first: Version
    fixed: Version
    """First version without the defect."""
    platform: str
    processors: str
    symptom: str
    flag: str
    """XLA flag that avoids the defect. `avoid` adds it to the variable `XLA_FLAGS`."""
    source: str

    @property
    def option(self) -> str:
        """Return the flag without its value."""
        return self.flag.partition("=")[0]


NO_XNNPACK = "--xla_cpu_use_xnnpack=false"
NO_YNN_SUMS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
"""Keep XLA from using its CPU kernel library (YNN) for sums. XLA still uses it for products, which are correct."""

DEFECTS = (
    Defect(
        "dense_products",
        (0, 7, 2),
        (0, 8, 3),
        "cpu",
        "seen on AMD EPYC, Zen 3; others not tried",
        "up to half of the matrix products of 250x784 by 784x300 are wrong, others in each run",
        NO_XNNPACK,
        "found by this project's tests",
    ),
    Defect(
        "sum_of_products",
        (0, 10, 2),
        (0, 11, 0),
        "cpu",
        "all x86-64",
        "a product followed by a sum is wrong from 32,769 rows on (16,385 in float64)",
        NO_YNN_SUMS,
        "https://github.com/jax-ml/jax/issues/39103",
    ),
    Defect(
        "sum_of_8_axes",
        (0, 10, 2),
        (0, 11, 1),
        "cpu",
        "all x86-64",
        "a broadcast product summed over one of 8 axes crashes or hangs",
        NO_YNN_SUMS,
        "https://github.com/jax-ml/jax/issues/39257",
    ),
    Defect(
        "sum_of_7_axes",
        (0, 10, 2),
        (0, 11, 0),
        "cpu",
        "all x86-64",
        "a product summed over one of 7 axes crashes where another axis has size 1",
        NO_YNN_SUMS,
        "https://github.com/jax-ml/jax/issues/40412",
    ),
)
"""All known defects. jaxlib before 0.7.2 was not tried; cnnlib does not support it."""


def numbers_of(text: str) -> Version:
    """Return the first three numbers of a version. For example, `0.12.0.1` becomes (0, 12, 0)."""
    return tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())


def known(jaxlib: str) -> tuple[Defect, ...]:
    """Return the defects that a version of jaxlib has."""
    return tuple(defect for defect in DEFECTS if defect.first <= numbers_of(jaxlib) < defect.fixed)


def with_flags(jaxlib: str, flags: str) -> str:
    """Add to `flags` the XLA flags that the version `jaxlib` needs. Options that `flags` sets stay unchanged."""
    for defect in known(jaxlib):
        if defect.option not in flags:
            flags = f"{flags} {defect.flag}".strip()
    return flags


def avoid() -> None:
    """Add to `XLA_FLAGS` the flags that the installed jaxlib needs.

    Warn if JAX has already started. The flags then have no effect, because JAX reads them once, at its first
    computation.
    """
    try:
        jaxlib = version("jaxlib")
    except PackageNotFoundError:  # there is no jaxlib; parts of cnnlib run without it
        return
    before = os.environ.get("XLA_FLAGS", "")
    after = with_flags(jaxlib, before)
    if after == before:
        return
    os.environ["XLA_FLAGS"] = after
    bridge = sys.modules.get("jax._src.xla_bridge")  # JAX has no public name for this module
    if bridge is not None and bridge.backends_are_initialized():
        warnings.warn(
            f"JAX started before cnnlib was imported, and jaxlib {jaxlib} can compute wrong numbers so: import cnnlib "
            f"first, or set XLA_FLAGS='{after}' before Python starts",
            stacklevel=2,
        )
