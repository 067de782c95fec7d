"""Compute the confusion matrix of each arm, and make pictures of the arm's worst mistakes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cnnlib.runs.predictions import Predictions
from cnnlib.runs.results import DataResult

MOST_CLASSES = 20
"""Largest number of classes with which a confusion matrix is shown."""


def class_name(data: DataResult, number: int) -> str:
    """Return the name of class `number`. If the classes have no names, return the number as text."""
    return data.class_names[number] if 0 <= number < len(data.class_names) else str(number)


def confusion_shares(found: Predictions, classes: int) -> np.ndarray:
    """Return an array `(true class, answer)`: of the examples of a class, the share that gets this answer.

    Shares are means over lanes that have not diverged. Each row sums to 1.
    """
    fine = found.predicted[(found.predicted >= 0).all(axis=1)]
    counts = np.zeros((classes, classes))
    np.add.at(counts, (np.broadcast_to(found.labels, fine.shape), fine), 1.0)
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0))


class Confusions(NamedTuple):
    """The confusion matrix of an arm."""

    name: str
    lanes: int
    """Number of lanes that have not diverged."""
    classes: list[str]
    shares: list[list[float]] | None
    """The result of `confusion_shares`. None if there are no lanes, or more than `MOST_CLASSES` classes."""


def confusions(answers: Mapping[str, Predictions], data: DataResult) -> list[Confusions]:
    """Return one confusion matrix per arm."""
    parts = []
    for arm, found in answers.items():
        lanes = int((found.predicted >= 0).all(axis=1).sum())
        classes = int(max(found.labels.max(initial=0), found.predicted.max(initial=0))) + 1
        names = [class_name(data, number) for number in range(classes)]
        is_shown = lanes > 0 and classes <= MOST_CLASSES
        parts.append(Confusions(arm, lanes, names, confusion_shares(found, classes).tolist() if is_shown else None))
    return parts


class Mistake(NamedTuple):
    """A test example that most lanes get wrong: an image as a PNG, or a signal as lines."""

    label: str
    caption: str
    png: str
    """The image in base 64; empty for a signal."""
    lines: list[str]
    """Points of one line per channel, within 60 by 60; empty for an image."""


def mistakes(answers: Mapping[str, Predictions], data: DataResult, most: int) -> list[tuple[str, list[Mistake]]]:
    """Return for each arm up to `most` examples that most of its lanes get wrong. The highest mean loss comes first."""
    parts = []
    for arm, found in answers.items():
        fine = (found.predicted >= 0).all(axis=1)
        figures = []
        for index, example in list(zip(found.worst, found.worst_examples, strict=True))[:most]:
            votes = found.predicted[fine, index]
            classes, counts = np.unique(votes, return_counts=True)
            most_say = int(counts.argmax())
            true, taken = (class_name(data, int(number)) for number in (found.labels[index], classes[most_say]))
            told = f"is {true}; {counts[most_say]} of {len(votes)} say {taken}"
            label = f"Test example {index}: it {told}"
            is_signal = example.ndim == 2
            figures.append(Mistake(label, told, "" if is_signal else png(example), lines(example) if is_signal else []))
        if figures:
            parts.append((arm, figures))
    return parts


def scaled(example: np.ndarray) -> np.ndarray:
    """Return an example, rescaled to values from 0 to 1."""
    low, high = float(example.min()), float(example.max())
    return np.asarray((example.astype(np.float64) - low) / (high - low or 1.0))


def lines(signal: np.ndarray) -> list[str]:
    """Return one line per channel of a signal `(length, channel)`. The points of a line are in a square of 60 by 60."""
    found = []
    for channel in scaled(signal).T:
        places = np.linspace(1, 59, len(channel))
        found.append(" ".join(f"{x:.1f},{59 - 58 * y:.1f}" for x, y in zip(places, channel, strict=True)))
    return found


def png(image: np.ndarray) -> str:
    """Return an image `(height, width, channel)` as a PNG in base 64."""
    from PIL import Image

    pixels = image if image.dtype == np.uint8 else np.round(255 * scaled(image)).astype(np.uint8)
    mode = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    file = io.BytesIO()
    Image.fromarray(mode).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
