"""Processes of this machine as Linux tells them, where others begin and end meanwhile."""

from __future__ import annotations

import contextlib
from pathlib import Path


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
