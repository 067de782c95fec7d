"""Programs that a jaxlib with a known defect computes wrongly.

`python -m cnnlib.check.known_bad NAME` runs one program in its own process and prints its largest relative error.

Some programs crash or hang, and some fail only by chance. `jaxlib_defects.DEFECTS` gives the defects the same names.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np


def dense_products() -> float:
    """Run two dense layers 150 times and return the largest difference from the exact result."""
    generator = np.random.RandomState(0)
    first, second = (generator.normal(size=shape).astype(np.float32) for shape in ((784, 300), (300, 100)))
    layers = jax.jit(lambda x, first, second: (x @ first, jax.nn.relu(x @ first) @ second))
    worst = 0.0
    for _ in range(150):
        x = generator.normal(size=(250, 784)).astype(np.float32)
        hidden, out = jax.device_get(layers(x, first, second))
        expected = x.astype(np.float64) @ first
        worst = max(worst, difference(hidden, expected), difference(out, np.maximum(expected, 0) @ second))
    return worst


def sum_of_products() -> float:
    """Compute the sum of squares of `matrix @ row` for each of 32,769 rows, and return the largest difference."""
    rows = np.zeros((32_769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    found = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    return difference(found, rows[:, 0].astype(np.float64) ** 2)


def sum_of_8_axes() -> float:
    """Sum a broadcast product over the third of 8 axes, and return the largest difference."""
    few, many = np.ones((10, 4, 6), np.float32), np.ones((10, 4, 6, 9, 9, 9, 9, 9), np.float32)
    found = jax.jit(lambda few, many: jnp.sum(few[..., None, None, None, None, None] * many, axis=2))(few, many)
    return difference(found, np.full((10, 4, 9, 9, 9, 9, 9), 6.0))


def sum_of_7_axes() -> float:
    """Sum a product over the fourth of 7 axes (the second has size 1), and return the largest difference."""
    ones = np.ones((3, 1, 2, 2, 8, 8, 8), np.float32)
    found = jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(ones, ones)
    return difference(found, np.full((3, 1, 2, 8, 8, 8), 2.0))


def difference(found: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


PROGRAMS = {program.__name__: program for program in (dense_products, sum_of_products, sum_of_8_axes, sum_of_7_axes)}
LARGEST = 1e-5
"""Largest difference that rounding explains, for sums of at most 784 float32 products."""


if __name__ == "__main__":
    worst = PROGRAMS[sys.argv[1]]()
    sys.stdout.write(f"{worst}\n")
    sys.exit(0 if worst <= LARGEST else 1)
