"""Place the names of points in a figure so that no name covers another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Label(NamedTuple):
    """The box of a name. The unit of all lengths is the same, such as pixels; the y axis points up."""

    left: float
    bottom: float
    width: float
    height: float = 12.0


def raised(labels: Sequence[Label], step: float = 3.0) -> list[float]:
    """Return by how much to raise each label so that no two labels overlap. The lowest labels stay where they are."""
    raises = [0.0] * len(labels)
    placed: list[Label] = []
    for index in sorted(range(len(labels)), key=lambda index: labels[index].bottom):
        label = labels[index]
        while any(_overlap(label, other) for other in placed):
            label = label._replace(bottom=label.bottom + step)
        placed.append(label)
        raises[index] = label.bottom - labels[index].bottom
    return raises


def _overlap(one: Label, other: Label) -> bool:
    beside = one.left >= other.left + other.width or other.left >= one.left + one.width
    return not beside and abs(one.bottom - other.bottom) < max(one.height, other.height)
