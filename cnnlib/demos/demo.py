"""The class `Demo`, and functions that draw a demo. The demos themselves are in the other files of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnlib.report.style import pyplot_for_files
from cnnlib.system.files import write_whole
from cnnlib.system.registry import Registry


@dataclass(frozen=True)
class Demo:
    """A picture with a text, `look`, which says what to see in the picture."""

    draw: Callable[[], Any]
    """Function that makes a matplotlib figure or animation with `pyplot` and returns it. It works with any backend."""
    file: str
    """Name of the file: `.png` for a figure, `.gif` for an animation."""
    look: str


DEMOS: Registry[Demo] = Registry("demo")


def write(demo: Demo, out: Path, show: bool = False) -> tuple[Path, bool]:
    """Draw a demo into a file in the folder `out`; return the file's path, and whether a window was opened.

    The folder is created if it is missing. If `show` is true, also show the picture in a window, and return when the
    user has closed the window. Without a screen, no window opens.
    """
    pyplot = pyplot_for_windows() if show else None
    opens = pyplot is not None
    if pyplot is None:
        pyplot, _ = pyplot_for_files()
    out.mkdir(parents=True, exist_ok=True)
    path = out / demo.file
    drawn = demo.draw()
    if path.suffix == ".gif":
        write_whole(path, lambda place: drawn.save(place, writer="pillow"))  # plays as fast as in a window
    else:
        write_whole(path, lambda place: drawn.savefig(place, dpi=110))
    if opens:
        pyplot.show()
    pyplot.close("all")
    return path, opens


def pyplot_for_windows() -> Any | None:
    """Return matplotlib's `pyplot` if it can open windows, or None if there is no screen or no window toolkit."""
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    # `get_backend` makes matplotlib choose the first backend that works on this machine. Without a screen, this is Agg,
    # which draws files only.
    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)  # type: ignore[no-untyped-call]
    return pyplot if pyplot.get_backend().lower() in windows else None
