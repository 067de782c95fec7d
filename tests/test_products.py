"""What everything rests on: that JAX multiplies matrices rightly on this machine, with the versions that are here."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

import cnnlib


def test_dense_products_are_right_every_time():
    """With jaxlib 0.7.2 and its XNNPACK up to half were wrong, by whole batches, on an AMD EPYC (Zen 3)."""
    generator = np.random.RandomState(0)
    first, second = (generator.normal(size=shape).astype(np.float32) for shape in ((784, 300), (300, 100)))
    layers = jax.jit(lambda x, first, second: (x @ first, jax.nn.relu(x @ first) @ second))
    for _ in range(150):
        x = generator.normal(size=(250, 784)).astype(np.float32)
        hidden, out = jax.device_get(layers(x, first, second))
        expected = x.astype(np.float64) @ first
        np.testing.assert_allclose(hidden, expected, atol=1e-3)
        np.testing.assert_allclose(out, np.maximum(expected, 0) @ second, atol=2e-2)


@pytest.mark.parametrize(
    ("found", "before", "after"),
    [
        ("0.7.2", None, "--xla_cpu_use_xnnpack=false"),
        ("0.8.0.dev1", "--other=1", "--other=1 --xla_cpu_use_xnnpack=false"),
        ("0.8.0", "--xla_cpu_use_xnnpack=true", "--xla_cpu_use_xnnpack=true"),
        ("0.8.3", None, None),
        ("0.12.0.1", "--other=1", "--other=1"),  # which no longer know the flag
    ],
)
def test_only_versions_with_wrong_products_are_told_another_way(monkeypatch, found, before, after):
    monkeypatch.setattr(cnnlib, "version", lambda name: found)
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    cnnlib.avoid_wrong_products()
    assert os.environ.get("XLA_FLAGS") == after
    monkeypatch.undo()
