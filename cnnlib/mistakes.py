"""What each arm takes for what, as parts of a page: matrices of confusions, and the worst mistakes as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnlib.markup import folded, scrolling, text_of
from cnnlib.predictions import Answers

MOST_CLASSES = 20
"""Of a confusion matrix."""


def class_name(data: Mapping[str, Any], number: int) -> str:
    """A class's name where the data of the results have names, else its number."""
    names = data.get("class_names")
    known = isinstance(names, list) and 0 <= number < len(names)
    return str(names[number]) if known else str(number)  # type: ignore[index]


def confusion_shares(found: Answers, classes: int) -> np.ndarray:
    """`(true class, answer)`: shares of a true class, means over the lanes that have not diverged; rows sum to 1."""
    fine = found.predicted[(found.predicted >= 0).all(axis=1)]
    counts = np.zeros((classes, classes))
    np.add.at(counts, (np.broadcast_to(found.labels, fine.shape), fine), 1.0)
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0))


def confusions(answers: Mapping[str, Answers], data: Mapping[str, Any]) -> str:
    """A matrix an arm."""
    parts = ["<h3>Confusions</h3>"]
    for arm, found in answers.items():
        lanes = int((found.predicted >= 0).all(axis=1).sum())
        classes = int(max(found.labels.max(initial=0), found.predicted.max(initial=0))) + 1
        if not lanes or classes > MOST_CLASSES:
            parts.append(f"<p>{text_of(arm)}: no matrix, of {classes} classes and {lanes} lanes.</p>")
            continue
        names = [class_name(data, number) for number in range(classes)]
        head = "".join(f'<th scope="col">{text_of(name)}</th>' for name in names)
        rows = "".join(
            f'<tr><th scope="row">{text_of(names[row])}</th>'
            + "".join(
                f'<td{" class=right" if row == column else ""} style="--share:{share:.3f}">{100 * share:.1f}</td>'
                for column, share in enumerate(shares)
            )
            + "</tr>"
            for row, shares in enumerate(confusion_shares(found, classes))
        )
        caption = f"{arm}: percent of a true class (row) that is taken for a class (column), mean of {lanes} lanes"
        table = f'<table class="confusion"><caption>{text_of(caption)}</caption>'
        table += f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
        parts.append(folded(arm, scrolling(f"Confusions of {arm}", table)))
    return "\n".join(parts)


def mistakes(answers: Mapping[str, Answers], data: Mapping[str, Any], most: int) -> str:
    """At most so many examples an arm that most of its lanes get wrong, of the highest mean loss first."""
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
            picture = drawing(example, f"Test example {index}: it {told}")
            figures.append(f"<figure>{picture}<figcaption>{text_of(told)}</figcaption></figure>")
        if figures:
            parts.append(folded(f"{arm}: {len(figures)}", f'<div class="mistakes">{"".join(figures)}</div>'))
    told = "Test examples that more than half of an arm's lanes get wrong, those of the highest mean loss first."
    return "\n".join(["<h3>Worst mistakes</h3>", f'<p class="quiet">{told}</p>', *parts]) if parts else ""


def drawing(example: np.ndarray, label: str) -> str:
    """An image as a PNG inside the page, a signal as a line; `example` is `(*spatial, channel)`."""
    low, high = float(example.min()), float(example.max())
    scaled = (example.astype(np.float64) - low) / (high - low or 1.0)
    if example.ndim == 2:
        lines = []
        for channel in scaled.T:
            places = np.linspace(1, 59, len(channel))  # as wide as high, however long the signal is
            points = " ".join(f"{x:.1f},{59 - 58 * y:.1f}" for x, y in zip(places, channel, strict=True))
            lines.append(f'<polyline points="{points}" fill="none" stroke="#0057a8" stroke-width="1.2"/>')
        return f'<svg viewBox="0 0 60 60" role="img" aria-label="{text_of(label)}">{"".join(lines)}</svg>'
    from PIL import Image

    pixels = example if example.dtype == np.uint8 else np.round(255 * scaled).astype(np.uint8)
    mode = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    file = io.BytesIO()
    Image.fromarray(mode).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{text_of(label)}" src="data:image/png;base64,{data}">'
