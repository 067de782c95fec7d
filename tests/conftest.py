"""The test session is strict: warnings are errors, implicit rank promotion raises, shapes in signatures are checked."""

from __future__ import annotations

import gc
import os

# Before JAX is imported: every test runs on the CPU, whatever the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["WANDB_MODE"] = "disabled"  # whatever key the developer has: tests that want W&B say so

import hypothesis
import jax
import matplotlib
import pytest
from processes import FAST_COMPILATION

os.environ.update(FAST_COMPILATION)  # of the processes that tests start, too
jax.config.update("jax_disable_most_optimizations", True)

for variable in list(os.environ):  # by which JAX would find a cluster
    if variable.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")):
        del os.environ[variable]

# Processes that tests start in a home of their own would look through all fonts again, and say so where that is slow.
os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())
# Examples are the same in each run, and may take their time: `--hypothesis-profile=explore` looks for others.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("explore", **patient)
hypothesis.settings.register_profile("fixed", derandomize=True, **patient)
hypothesis.settings.load_profile("fixed")

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish() -> None:
    """Collect garbage rarely: tracing makes so many objects that looking for it takes a fifth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def compiling_well(monkeypatch):
    """Processes that the test starts compile as those of users do."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture
def float64():
    """Double precision inside the test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
