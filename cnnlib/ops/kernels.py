"""CPU kernels for convolution, local layers and max pooling: compile kernels.cc once per machine and let XLA call it.

XLA's own CPU convolutions are slow for weight gradients in loops and for few channels. kernels.cc takes a quarter to
half of the time of XLA (`benchmarks/README.md`). kernels.cc needs a C++17 compiler (`$CXX`, or `c++` if `CXX` is not
set); the headers come with JAX. The first use compiles kernels.cc for this processor, which takes 10 to 20 s. The
compiled library is kept in the user's cache folder, unless other users could change files there.

By default, kernels.cc is used if it compiles. `CNNLIB_KERNELS=xla` uses XLA instead. `CNNLIB_KERNELS=native` raises an
error if kernels.cc does not compile. `CNNLIB_KERNELS=gpu` and `=tpu` run the GPU or TPU lowerings
(`cnnlib/ops/lowerings/`) on a CPU. This is slow; the tests use it to check these lowerings.
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

from cnnlib.errors import UserError
from cnnlib.system.cache import cache_folder, changeable_by_others, keep_file, refusal

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
    """Return the compiler flags for `machine`, a kind of processor as named by `platform.machine()`.

    clang accepts `-march=native` only on x86. On ARM, clang and g++ both accept `-mcpu=native`.
    """
    own = "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"
    return ("-std=c++17", "-O3", own, "-shared", "-fPIC", "-w")


FLAGS = flags(platform.machine())


class Unavailable(Exception):
    """The native kernels cannot be used on this machine. The message gives the reason in one line."""


def asked() -> Kernels | None:
    """Return the value of `CNNLIB_KERNELS`, or None for `auto`. Raise UserError for an unknown value."""
    wanted = os.environ.get("CNNLIB_KERNELS", "auto")
    if wanted == "auto":
        return None
    kinds: tuple[Kernels, ...] = get_args(Kernels)
    for kind in kinds:
        if wanted == kind:
            return kind
    raise UserError(f"CNNLIB_KERNELS={wanted}: expected auto or one of {', '.join(kinds)}")


def chosen() -> Kernels:
    """Return which kernels run float32 convolutions, local layers and max pooling on the CPU.

    `native` means kernels.cc, `xla` means XLA's own operations, and `gpu` and `tpu` mean the lowerings for that
    platform. Raises UserError if `CNNLIB_KERNELS` is unknown, or is `native` and kernels.cc cannot be compiled.
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
    """Compile kernels.cc if needed and register it with XLA, once per process. Return the error message, if any."""
    try:
        kernels = library()
    except Unavailable as error:
        return str(error)
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(kernels, target)), platform="cpu")
    return None


def is_compiled() -> bool:
    """Return whether the compiled kernels are in the cache. Also return True if they cannot be compiled at all."""
    try:
        return is_intact(library_path(compiler()))
    except Unavailable:
        return True


def not_kept() -> str | None:
    """Return the reason why every process compiles the kernels again, or None if the cache keeps them."""
    return refusal(cache_folder("kernels"))


def library() -> ctypes.CDLL:
    """Return the shared library for this machine.

    Compile kernels.cc if the cached library is missing or damaged, or if other users could change it. Raises
    Unavailable if there is no compiler, or if compiling or loading fails.
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
        kernels = loaded(fresh)  # stays loaded after the file is deleted
        keep(fresh, path)
    return kernels


def loaded(path: Path) -> ctypes.CDLL:
    """Load a library from its file. Raise Unavailable if that fails or a kernel is missing."""
    try:
        kernels = ctypes.CDLL(str(path))
        for target in TARGETS:
            getattr(kernels, target)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the compiled kernels cannot be loaded: {error}") from error
    return kernels


def keep(fresh: Path, path: Path) -> None:
    """Copy the compiled library `fresh` to `path`, and write its SHA-256 to a file beside `path`.

    The next process looks for the library at `path`. Several processes may write at once, so each file is replaced as
    a whole. If the folder is not writable, or other users could change it, nothing is kept, and the next process
    compiles again.
    """
    content = fresh.read_bytes()
    files = {path: content, path.with_suffix(".sha256"): hashlib.sha256(content).hexdigest().encode()}
    if refusal(path.parent) is None:
        for final, data in files.items():
            keep_file(final, data)


def is_intact(path: Path) -> bool:
    """Return whether the library exists, matches its SHA-256, and cannot be changed by other users."""
    try:
        expected = path.with_suffix(".sha256").read_text()
        return not changeable_by_others(path) and hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def compiler() -> list[str]:
    """Return the command of the C++ compiler. Raise Unavailable if there is none."""
    text = os.environ.get("CXX", "c++")
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise Unavailable(f"CXX={text} is no command: {error}") from error
    if not command or shutil.which(command[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({' '.join(command) or 'CXX is empty'})")
    return command


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler. Raise Unavailable if it does not start."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Unavailable(f"the C++ compiler {arguments[0]} does not start: {error.strerror}") from error


def library_path(command: Sequence[str]) -> Path:
    """Return the cache path of the library for this source, compiler, JAX version and processor.

    The file name depends on the processor because several machines may share a home folder.
    """
    version = run([*command, "--version"]).stdout
    parts = (SOURCE.read_text(), version, shlex.join([*command, *FLAGS]), jax.__version__, processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder("kernels") / f"{key}.so"


def processor() -> str:
    """Return a text that differs between processors with different instruction sets."""
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
        target: Name of the kernel.
        output: Shape and type of the result, or of two results.
        arguments: Operands of the kernel.
        attributes: Static arguments of the kernel.
        scratch: Shape and type of a temporary buffer that XLA allocates for the kernel.
    """
    integers: dict[str, Any] = {name: np.array(value, np.int64) for name, value in attributes.items()}
    if scratch is None:
        return jax.ffi.ffi_call(target, output)(*arguments, **integers)
    result, _ = jax.ffi.ffi_call(target, (output, scratch))(*arguments, **integers)
    return result
