"""Find the cores, memory and GPUs that this process may use. Control groups (of containers) limit cores and memory."""

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
    """Return how many cores this process may use. CPU affinity and the CPU quota of control groups limit the number."""
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
    """Return the bytes of host memory that this process can still use.

    The result respects the limits of control groups, which containers and Slurm set, and `ulimit -v`, which limits the
    address space. Inside a control group, cached file pages count as free, because the kernel can drop them.
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
    """Yield the folders of this process's control groups and of their parents, for cgroup versions 1 and 2.

    Each of these groups may have a limit. A process in a container may see only the outermost group. `controller` is
    `cpu` or `memory`.
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
    """Return the integer after `pattern` in the kernel statistics `text`; `otherwise` if no line matches."""
    found = re.search(pattern + r"\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else otherwise


def gpus() -> list[dict[str, str]] | None:
    """Return one dict of environment variables per GPU. A process that gets these variables uses only this GPU.

    On a TPU machine, return one empty dict, so that one process uses all chips. Return None if JAX has neither GPU nor
    TPU, or if `JAX_PLATFORMS` excludes both.
    """
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
