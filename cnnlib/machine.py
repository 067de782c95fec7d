"""What of this machine a process may use: cores and memory, as its control groups leave them, and GPUs."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cores_here() -> int:
    """Cores that this process may use: those it may run on, as far as the share of time of its control groups goes."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in groups("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no limit here
            share, period = (group / "cpu.max").read_text().split()
            count = min(count, math.ceil(int(share) / int(period)))
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            share, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(share) > 0:
                count = min(count, math.ceil(int(share) / int(period)))
    return count


def free_memory() -> int:
    """Bytes that the host has free.

    A limit of a control group counts as well (what containers and Slurm set), where file pages that it would give up
    are free, and one on the address space (`ulimit -v`).
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (meminfo := Path("/proc/meminfo")).exists():
        free = 1024 * number_after(r"^MemAvailable:", meminfo.read_text(), otherwise=free // 1024)
    for group in groups("memory"):
        for limit, used, cached in (
            ("max", "current", "inactive_file"),
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # no limit here
                left = int((group / f"memory.{limit}").read_text()) - int((group / f"memory.{used}").read_text())
                parts = group / "memory.stat"
                known = parts.read_text() if parts.exists() else ""
                free = min(free, left + number_after(f"^{cached}", known, otherwise=0))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY and (status := Path("/proc/self/status")).exists():
        free = min(free, most - 1024 * number_after("^VmSize:", status.read_text(), otherwise=0))
    return max(0, free)


def groups(controller: str) -> Iterator[Path]:
    """The control groups of this process and those around them, of version 2 and of version 1 (`cpu`, `memory`).

    What is limited may be any of them; a container may see only the outermost, as that of its own.
    """
    with contextlib.suppress(OSError):  # not Linux
        for line in OWN_GROUPS.read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            root = GROUPS / controller if names else GROUPS
            own = Path(path.lstrip("/"))
            yield from (root / group for group in (own, *own.parents))


def number_after(pattern: str, text: str, otherwise: int) -> int:
    """The whole number that follows the start of a line, as the kernel's accounts have it."""
    found = re.search(pattern + r"\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else otherwise


def gpus() -> list[dict[str, str]] | None:
    """Return what tells a process to take one of this machine's GPUs, for each; one entry for all of a TPU."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")
    if asked != [""] and not {"cuda", "gpu", "tpu"} & set(asked):
        return None
    if find_spec("jax_cuda12_plugin") or find_spec("jax_cuda13_plugin"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        place = Path("/proc/driver/nvidia/gpus")
        names = [str(number) for number in range(len(list(place.iterdir())))] if place.is_dir() else []
        names = names if visible is None else [name for name in visible.split(",") if name and name != "-1"]
        if names:
            return [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    is_tpu = find_spec("libtpu") is not None and any(Path("/dev").glob("accel*"))
    return [{}] if is_tpu else None
