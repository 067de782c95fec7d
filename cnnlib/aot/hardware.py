"""Accelerators to compile for, such as `tpu:v5e:2x4` or `cuda:h100`, with the published figures of their chips."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Literal

from cnnlib.errors import UserError


@dataclass(frozen=True)
class Chip:
    """The published figures of one kind of JAX device. Each figure is for one device."""

    name: str
    peak_flops: float
    """Floating-point operations per second of bfloat16 matrix products. A multiply-add counts as two."""
    bandwidth: float
    """Bandwidth of main memory, in bytes per second."""
    memory_bytes: int
    clock: float
    """Cycles per second of a TPU's core: `peak_flops` divided by the operations per cycle of its matrix units."""
    source: str


GIB = 2**30
TPUS = {
    # A v4 or v5p chip has two cores. JAX shows them as one device, but libtpu's schedule is for one core.
    "v4": Chip("TPU v4", 275e12, 1228e9, 32 * GIB, 1.05e9, "https://docs.cloud.google.com/tpu/docs/v4"),
    "v5e": Chip("TPU v5e", 197e12, 819e9, 16 * GIB, 1.5e9, "https://docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("TPU v5p", 459e12, 2765e9, 95 * GIB, 1.75e9, "https://docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("TPU v6e", 918e12, 1640e9, 32 * GIB, 1.75e9, "https://docs.cloud.google.com/tpu/docs/v6e"),
}
GPUS = {
    "h100": Chip("H100 SXM", 989e12, 3350e9, 80 * GIB, 1.98e9, "https://www.nvidia.com/en-us/data-center/h100/"),
    # The H200 is an H100 with a different memory, so it is compiled with the description of the H100.
    "h200": Chip("H200 SXM", 989e12, 4800e9, 141 * 10**9, 1.98e9, "https://www.nvidia.com/en-us/data-center/h200/"),
}


LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # without it, libtpu queries Google's metadata server and waits
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any machine type with TPUs will do
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it, a second process stops at libtpu's lock
}
"""Environment variables that libtpu needs on a machine without TPUs."""


def set_environment() -> None:
    """Set the environment for compiling. Call this before JAX is imported, or JAX looks for a TPU and warns."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # keeps JAX from looking for a TPU
    for name, value in LIBTPU_ENVIRONMENT.items():
        if os.environ.get(name, "WARNING").startswith("WARNING"):  # JAX sets "WARNING..." if it finds no value
            os.environ[name] = value


@dataclass(frozen=True)
class Target:
    """Hardware to compile for."""

    platform: Literal["tpu", "cuda"]
    chip: Chip
    topology: str
    """Kind of the chips and, for TPUs, the number of chips per axis, such as v5e:2x4."""
    devices: int

    def __str__(self) -> str:
        return f"{self.platform}:{self.topology}"


def parse_target(text: str) -> Target:
    """Parse `tpu:v5e:2x4` (`tpu:v5e` is one chip) or `cuda:h100`. Raise UserError for any other text."""
    platform, _, rest = text.partition(":")
    name, _, shape = rest.partition(":")
    if platform == "cuda" and name in GPUS and not shape:
        return Target("cuda", GPUS[name], name, 1)
    if platform == "tpu" and name in TPUS and re.fullmatch(r"([1-9]\d*x){1,2}[1-9]\d*", shape or "1x1"):
        axes = [int(n) for n in (shape or "1x1").split("x")]
        axes += [1] * (("v4", "v5p").count(name) and 3 - len(axes))
        return Target("tpu", TPUS[name], f"{name}:{'x'.join(map(str, axes))}", math.prod(axes))
    known = ", ".join([f"tpu:{kind}:2x4" for kind in TPUS] + [f"cuda:{kind}" for kind in GPUS])
    raise UserError(f"{text} is no hardware to compile for; expected for example {known}")
