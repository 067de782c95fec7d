"""What a demo is, and how one becomes a file or a window; the demos themselves are in `cnnlib/demos`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnlib.registry import Registry
from cnnlib.style import pyplot_for_files
from cnnlib.tracking import write_whole


@dataclass(frozen=True)
class Demo:
    """A picture, and what there is to see in it."""

    draw: Callable[[], Any]
    """Makes a matplotlib figure, or an animation of one; with `pyplot`, whatever its backend."""
    file: str
    """What it is called: `.png` a figure, `.gif` an animation."""
    look: str


DEMOS: Registry[Demo] = Registry("demo")


def write(demo: Demo, out: Path, show: bool = False) -> tuple[Path, bool]:
    """Draws a demo into a folder, which is made if need be; returns the file's path, and whether a window was opened.

    With `show` it is in a window as well, until that is closed, where matplotlib finds a screen to open one on.
    """
    pyplot = pyplot_for_windows() if show else None
    opens = pyplot is not None
    if pyplot is None:
        pyplot, _ = pyplot_for_files()
    out.mkdir(parents=True, exist_ok=True)
    path = out / demo.file
    drawn = demo.draw()
    if path.suffix == ".gif":
        write_whole(path, lambda place: drawn.save(place, writer="pillow"))  # as fast as in a window
    else:
        write_whole(path, lambda place: drawn.savefig(place, dpi=110))
    if opens:
        pyplot.show()
    pyplot.close("all")
    return path, opens


def pyplot_for_windows() -> Any | None:
    """matplotlib's `pyplot` where it can open windows, else None: without a screen, or without a toolkit for one."""
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    # Asked for its backend, matplotlib looks for the first that works here; Agg, which draws files, always does.
    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)  # type: ignore[no-untyped-call]
    return pyplot if pyplot.get_backend().lower() in windows else None
