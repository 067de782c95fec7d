"""The processor for processes beside the training: what training leaves idle, until somebody waits for them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

LOWEST = 19


def lower(process: int) -> None:
    """Lets a process, and those that it has started, run only where nobody else wants the processor."""
    set_priority(process, LOWEST, is_idle=True)


def lend(process: int) -> bool:
    """Gives them the priority of this process; False where the system lets only administrators raise one."""
    is_idle = sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_IDLE
    return set_priority(process, os.getpriority(os.PRIO_PROCESS, 0), is_idle)


def set_priority(process: int, nice: int, is_idle: bool) -> bool:
    """Sets it for every thread of a process and of those that it has started, and says whether it may.

    Processes that have a session of their own as well: Linux shares the processor out by sessions before it looks at
    priorities, where it has `autogroup`.
    """
    try:
        for one in [process, *children(process)]:
            for thread in threads(one):
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    set_policy(thread, is_idle)
                    os.setpriority(os.PRIO_PROCESS, thread, nice)
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(one) == one != process:
                    with contextlib.suppress(OSError):  # no such thing here, or asked too often
                        Path(f"/proc/{one}/autogroup").write_text(str(nice))
    except PermissionError:
        return False
    return True


def set_policy(thread: int, is_idle: bool) -> None:
    """Where Linux has such a thing: sandboxes that stand in for it have priorities alone."""
    if sys.platform == "linux":
        try:
            os.sched_setscheduler(thread, os.SCHED_IDLE if is_idle else os.SCHED_OTHER, os.sched_param(0))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise


def threads(process: int) -> list[int]:
    """The threads of a process, where the system tells; else itself."""
    with contextlib.suppress(OSError):  # it has ended
        return [int(path.name) for path in Path(f"/proc/{process}/task").iterdir()]
    return [process]


def children(process: int) -> Iterator[int]:
    """Those that a process has started, and so on."""
    for thread in threads(process):
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split()):
                yield child
                yield from children(child)
