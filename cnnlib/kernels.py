"""The CPU's kernels for convolution and max pooling: kernels.cc, compiled once a machine, called by XLA.

XLA's own CPU convolutions are slow where they count here: weight gradients in loops, and few channels. kernels.cc takes
a quarter to a half of their time (`benchmarks/README.md`). It needs a C++17 compiler (`$CXX`, else `c++`); the headers
come with JAX. It is compiled for the processor at hand at its first use, in about 5 s, and kept in the user's cache
folder. `CNNLIB_KERNELS=xla` does without it, `CNNLIB_KERNELS=native` insists on it; by default it is used on a machine
that can compile it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from cnnlib.errors import UserError

Kernels = Literal["native", "xla"]

SOURCE = Path(__file__).with_name("kernels.cc")
TARGETS = ("cnnlib_correlate", "cnnlib_kernel_gradient", "cnnlib_max_pool", "cnnlib_max_pool_gradient")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-w")


class Unavailable(Exception):
    """Why the native kernels cannot be had on this machine, in one line."""


def chosen() -> Kernels:
    """Which kernels convolve and pool float32 on the CPU in this process: those of kernels.cc, or XLA's own.

    Raises UserError for an unknown `CNNLIB_KERNELS`, and for `native` where kernels.cc cannot be compiled.
    """
    wanted = os.environ.get("CNNLIB_KERNELS", "auto")
    if wanted not in ("auto", "native", "xla"):
        raise UserError(f"CNNLIB_KERNELS={wanted}: expected auto, native or xla")
    if wanted == "xla":
        return "xla"
    problem = register()
    if problem and wanted == "native":
        raise UserError(f"CNNLIB_KERNELS=native: {problem}")
    return "xla" if problem else "native"


@functools.cache
def register() -> str | None:
    """Compiles kernels.cc where that is still to be done and offers it to XLA, once a process; says what went wrong."""
    try:
        library = ctypes.CDLL(str(compiled()))
    except (Unavailable, OSError) as error:
        return str(error)
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return None


def is_compiled() -> bool:
    """Whether the next use of the kernels will find them compiled; also true where they cannot be."""
    try:
        return library_path(compiler()).exists()
    except Unavailable:
        return True


def compiled() -> Path:
    """The shared library for this machine, compiled if it is not there yet. Raises Unavailable."""
    command = compiler()
    path = library_path(command)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent if os.access(path.parent, os.W_OK) else Path(tempfile.mkdtemp(prefix="cnnlib-"))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="cnnlib-"))
    # Written whole under a name of its own: several processes may come here at once.
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    result = subprocess.run(
        [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", unfinished], capture_output=True, text=True
    )
    if result.returncode != 0:
        Path(unfinished).unlink()
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines() or ["?"]
        raise Unavailable(f"{shlex.join(command)} does not compile kernels.cc: {lines[0].strip()}")
    return Path(unfinished).replace(folder / path.name)


def compiler() -> list[str]:
    """The command of the C++ compiler; raises Unavailable where there is none."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({' '.join(command) or 'CXX is empty'})")
    return command


def library_path(command: Sequence[str]) -> Path:
    """Where the library of this source, compiler, JAX and processor is kept.

    The processor is part of the name because a home folder may serve many machines.
    """
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    parts = (SOURCE.read_text(), version, shlex.join([*command, *FLAGS]), jax.__version__, processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cnnlib" / "kernels" / f"{key}.so"


def processor() -> str:
    """What tells processors of different instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.system()} {platform.machine()} {features}"


def call(target: str, output: jax.ShapeDtypeStruct, *arguments: jax.Array, **attributes: tuple[int, ...]) -> jax.Array:
    """A call of one of `TARGETS` inside a traced function."""
    integers: dict[str, Any] = {name: np.array(value, np.int64) for name, value in attributes.items()}
    result: jax.Array = jax.ffi.ffi_call(target, output)(*arguments, **integers)
    return result
