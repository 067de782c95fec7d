"""Record the provenance of a run: machine, environment variables, packages, versions, source hash and git commit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import cnnlib

MOST_BYTES = 2**30


def now() -> str:
    """Return the current UTC time in ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


VARIABLES = (
    "CNNLIB_KERNELS",
    "CUDA_VISIBLE_DEVICES",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS",
    "TFDS_DATA_DIR",
    "XLA_FLAGS",
)
"""Environment variables that can change a result and hold no secrets. A run records no others."""


@functools.cache  # reading some hundred files takes a third of a second
def packages() -> dict[str, str]:
    """Return the installed packages and their versions, by name."""
    found = [distribution.metadata for distribution in metadata.distributions()]
    versions = {known["Name"]: known["Version"] for known in found if known["Name"]}
    return dict(sorted(versions.items(), key=lambda entry: entry[0].lower()))


def environment(command: str | None) -> dict[str, Any]:
    """Return the content of `environment.json`: where a run happened, and `command`, which repeats the run."""
    import platform

    revision = commit()
    return {
        "command": command,
        "commit": revision,
        "diff": "git.diff" if (revision or "").endswith("-dirty") else None,
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": packages(),
    }


def machine() -> tuple[str, int | None]:
    """Return the host processor's name and number of cores, even if the models run on another device."""
    import platform

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # not Linux: keep the name from above
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return name, os.cpu_count()


def versions() -> dict[str, str]:
    """Return the versions of Python, of cnnlib and of the libraries that a result depends on."""
    import platform

    libraries = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"python": platform.python_version(), **libraries, "cnnlib": cnnlib.__version__}


DECIDING = ("spec", "config", "stats", "data", "ops", "nn", "train", "runs")
"""Packages that can change the results of a run. A run can be resumed after an edit of any other package."""


def code_sha256() -> str:
    """Return the SHA-256 of all sources in the `DECIDING` packages, in the order of their paths."""
    digest = hashlib.sha256()
    folder = Path(cnnlib.__file__).parent
    sources = [path for package in DECIDING for path in (folder / package).rglob("*") if path.suffix in (".py", ".cc")]
    for path in sorted(sources):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    """Return git's output for cnnlib's own checkout; None outside a checkout or without git.

    `core.fsmonitor` names a program that git runs. It is turned off, because another user may have set it.
    """
    package = Path(cnnlib.__file__).parent
    command = ["git", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, cwd=package, capture_output=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def commit() -> str | None:
    """Return the commit of cnnlib's checkout, plus `-dirty` if tracked files have changed; None outside git."""
    # An installed copy may lie inside somebody else's checkout. The checkout is ours only if git tracks this file.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision.strip() + (
        "-dirty" if (_git("status", "--porcelain", "--untracked-files=no") or "").strip() else ""
    )


def diff() -> str:
    """Return the changes of tracked files since the commit of cnnlib's checkout.

    Git runs without colours and without external diff tools.
    """
    return _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") or ""
