"""Processes that tests start, and those of this machine as Linux tells them, where others begin and end meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import jax

# XLA compiles a program in one thread: each process of the tests has one core.
flags = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11) and platform.machine() == "x86_64":
    # Without its fusion emitters XLA compiles in half the time; later versions have nothing else. With AVX, 0.10.2
    # then computed wrong gradients: of a compiled function, a net with a norm, in float64.
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_max_isa=SSE4_2"]
FAST_COMPILATION = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "XLA_FLAGS": " ".join(dict.fromkeys([*os.environ.get("XLA_FLAGS", "").split(), *flags])),
}
"""Variables of the environment with which XLA compiles fast rather than well: compiling takes most of the time."""


def stat(pid):
    """State and parent of a process; None for one that is gone."""
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        return state, int(parent)
    return None


def is_living(pid):
    """Whether it has not ended: who waits for one whose parent is gone depends on the machine."""
    found = stat(pid)
    return found is not None and found[0] != "Z"


def children(pid):
    """Those that it has started and that are there, also those that have ended and were not waited for."""
    known = {int(place.name): stat(place.name) for place in Path("/proc").glob("[0-9]*")}
    return [child for child, found in known.items() if found is not None and found[1] == pid]
