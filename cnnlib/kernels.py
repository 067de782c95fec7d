"""The CPU's kernels for convolution, local layers and max pooling: kernels.cc, compiled once a machine, called by XLA.

XLA's own CPU convolutions are slow where they count here: weight gradients in loops, and few channels. kernels.cc takes
a quarter to a half of their time (`benchmarks/README.md`). It needs a C++17 compiler (`$CXX`, else `c++`); the headers
come with JAX. It is compiled for the processor at hand at its first use, in 10 to 20 s, and kept in the user's cache
folder, unless others could change it there. `CNNLIB_KERNELS=xla` does without it, `CNNLIB_KERNELS=native` insists on
it; by default it is used on a machine that can compile it. `CNNLIB_KERNELS=gpu` and `=tpu` compute on a CPU in the
forms that those platforms run (`cnnlib/lowerings.py`): that is slow, and shows that they are right.
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
from typing import Any, Literal, get_args, overload

import jax
import numpy as np

from cnnlib.cache import cache_folder, changeable_by_others, keep_file, refusal
from cnnlib.errors import UserError

Kernels = Literal["native", "xla", "gpu", "tpu"]

SOURCE = Path(__file__).with_name("kernels.cc")
TARGETS = (
    "cnnlib_correlate",
    "cnnlib_correlate_pooled",
    "cnnlib_correlate_unpooled",
    "cnnlib_kernel_gradient",
    "cnnlib_kernel_gradient_unpooled",
    "cnnlib_scatter",
    "cnnlib_scatter_unpooled",
    "cnnlib_local_correlate",
    "cnnlib_local_input_gradient",
    "cnnlib_local_kernel_gradient",
    "cnnlib_max_pool",
    "cnnlib_max_pool_gradient",
)


def flags(machine: str) -> tuple[str, ...]:
    """Return the compiler's flags for a kind of processor, named as by `platform.machine`.

    clang takes `-march=native` on x86 alone, and `-mcpu=native` on ARM, as g++ does.
    """
    own = "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"
    return ("-std=c++17", "-O3", own, "-shared", "-fPIC", "-w")


FLAGS = flags(platform.machine())


class Unavailable(Exception):
    """Why the native kernels cannot be had on this machine, in one line."""


def asked() -> Kernels | None:
    """Return what `CNNLIB_KERNELS` asks for, None for `auto`. Raises UserError for anything unknown."""
    wanted = os.environ.get("CNNLIB_KERNELS", "auto")
    if wanted == "auto":
        return None
    kinds: tuple[Kernels, ...] = get_args(Kernels)
    for kind in kinds:
        if wanted == kind:
            return kind
    raise UserError(f"CNNLIB_KERNELS={wanted}: expected auto or one of {', '.join(kinds)}")


def chosen() -> Kernels:
    """Choose what convolves and pools float32 on the CPU in what is traced next.

    These are the kernels of kernels.cc (native), XLA's own (xla), or the forms of another platform (gpu, tpu).
    Raises UserError for an unknown `CNNLIB_KERNELS`, and for `native` where kernels.cc cannot be compiled.
    """
    wanted = asked()
    if wanted not in (None, "native"):
        return wanted
    problem = register()
    if problem and wanted == "native":
        raise UserError(f"CNNLIB_KERNELS=native: {problem}")
    return "xla" if problem else "native"


@functools.cache
def register() -> str | None:
    """Compiles kernels.cc where that is still to be done and offers it to XLA, once a process; says what went wrong."""
    try:
        kernels = library()
    except Unavailable as error:
        return str(error)
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(kernels, target)), platform="cpu")
    return None


def is_compiled() -> bool:
    """Whether the next use of the kernels will find them compiled; also true where they cannot be."""
    try:
        return is_intact(library_path(compiler()))
    except Unavailable:
        return True


def not_kept() -> str | None:
    """Say why each process compiles the kernels anew; None where they are kept."""
    return refusal(cache_folder("kernels"))


def library() -> ctypes.CDLL:
    """The shared library for this machine, compiled if it is not there, damaged, or others could change it.

    Raises Unavailable.
    """
    command = compiler()
    path = library_path(command)
    if is_intact(path):
        return loaded(path)
    with tempfile.TemporaryDirectory(prefix="cnnlib-") as folder:
        fresh = Path(folder) / path.name
        arguments = [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(fresh)]
        result = run(arguments)
        if result.returncode != 0:
            told = result.stderr.splitlines() or [f"exit status {result.returncode}"]
            reason = next((line for line in told if "error" in line), told[0]).strip()
            raise Unavailable(f"{shlex.join(command)} does not compile kernels.cc: {reason}")
        kernels = loaded(fresh)  # stays loaded when the file is gone
        keep(fresh, path)
    return kernels


def loaded(path: Path) -> ctypes.CDLL:
    """The library of a file that has all kernels; raises Unavailable for any other."""
    try:
        kernels = ctypes.CDLL(str(path))
        for target in TARGETS:
            getattr(kernels, target)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the compiled kernels cannot be loaded: {error}") from error
    return kernels


def keep(fresh: Path, path: Path) -> None:
    """Puts a compiled library where the next process looks for it, beside the hash of what it holds.

    Each file appears whole, since several processes may come here at once. A folder that cannot be written, or that
    others could change, keeps nothing, and the next process compiles again.
    """
    content = fresh.read_bytes()
    files = {path: content, path.with_suffix(".sha256"): hashlib.sha256(content).hexdigest().encode()}
    if refusal(path.parent) is None:
        for final, data in files.items():
            keep_file(final, data)


def is_intact(path: Path) -> bool:
    """Whether the library is there, is what was written, and others could not change it."""
    try:
        expected = path.with_suffix(".sha256").read_text()
        return not changeable_by_others(path) and hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def compiler() -> list[str]:
    """The command of the C++ compiler; raises Unavailable where there is none."""
    text = os.environ.get("CXX", "c++")
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise Unavailable(f"CXX={text} is no command: {error}") from error
    if not command or shutil.which(command[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({' '.join(command) or 'CXX is empty'})")
    return command


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs the compiler; raises Unavailable where it cannot even start."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Unavailable(f"the C++ compiler {arguments[0]} does not start: {error.strerror}") from error


def library_path(command: Sequence[str]) -> Path:
    """Where the library of this source, compiler, JAX and processor is kept.

    The processor is part of the name because a home folder may serve many machines.
    """
    version = run([*command, "--version"]).stdout
    parts = (SOURCE.read_text(), version, shlex.join([*command, *FLAGS]), jax.__version__, processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder("kernels") / f"{key}.so"


def processor() -> str:
    """What tells processors of different instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.system()} {platform.machine()} {features}"


@overload
def call(
    target: str,
    output: jax.ShapeDtypeStruct,
    *arguments: jax.Array,
    attributes: dict[str, tuple[int, ...]],
    scratch: jax.ShapeDtypeStruct | None = None,
) -> jax.Array: ...


@overload
def call(
    target: str,
    output: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    *arguments: jax.Array,
    attributes: dict[str, tuple[int, ...]],
) -> tuple[jax.Array, jax.Array]: ...


def call(
    target: str,
    output: Any,
    *arguments: jax.Array,
    attributes: dict[str, tuple[int, ...]],
    scratch: jax.ShapeDtypeStruct | None = None,
) -> Any:
    """Call one of `TARGETS` inside a traced function.

    Args:
        target: Its name.
        output: Shape and type of the result, or of two results.
        arguments: Its operands.
        attributes: Its static arguments.
        scratch: Room that XLA gives it.
    """
    integers: dict[str, Any] = {name: np.array(value, np.int64) for name, value in attributes.items()}
    if scratch is None:
        return jax.ffi.ffi_call(target, output)(*arguments, **integers)
    result, _ = jax.ffi.ffi_call(target, (output, scratch))(*arguments, **integers)
    return result
