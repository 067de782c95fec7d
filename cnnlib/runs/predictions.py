"""The answers of an arm's models to the test examples: predicted class and loss. A lane is one model of the arm.

The confusions and mistakes are computed from the file that holds these answers.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnnlib.errors import UserError
from cnnlib.runs.folder import PREDICTIONS, RunFolder, inside
from cnnlib.system.files import cannot_write, write_whole

MOST_MISTAKES = 24
"""Largest number of misclassified examples to store per arm."""
MOST_BYTES = 2**30


UNREADABLE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.error)
"""Exceptions of NumPy and zipfile for archives that are damaged, encrypted, or declare arrays too large for memory."""


class Predictions(NamedTuple):
    """The answers of all lanes of an arm to the test examples."""

    labels: np.ndarray
    """`(example,)`, int32."""
    predicted: np.ndarray
    """`(lane, example)`, int32; -1 if the lane has diverged."""
    loss: np.ndarray
    """`(lane, example)`, float32: cross-entropy; NaN if the lane has diverged."""
    worst: np.ndarray
    """`(mistake,)`, int32: indices of examples that over half of the lanes get wrong, highest mean loss first."""
    worst_examples: np.ndarray
    """`(mistake, ...)`: the examples of `worst`, as stored in the data set."""


def answers_of(
    labels: np.ndarray,
    examples_at: Callable[[np.ndarray], np.ndarray],
    predicted: np.ndarray,
    loss: np.ndarray,
    diverged: np.ndarray,
) -> Predictions:
    """Return the answers in the form in which they are stored.

    `labels` has the shape `(example,)`, `predicted` and `loss` have `(lane, example)`, and `diverged` has `(lane,)`.
    `examples_at` returns the test examples at the given indices.
    """
    predicted = np.where(diverged[:, None], -1, predicted).astype(np.int32)
    loss = np.where(diverged[:, None], np.nan, loss).astype(np.float32)
    fine = ~diverged
    worst = np.zeros(0, np.int32)
    if fine.any():
        is_mistake = (predicted[fine] != labels).mean(axis=0) > 0.5
        by_loss = np.argsort(-loss[fine].mean(axis=0, dtype=np.float64), kind="stable")
        worst = by_loss[is_mistake[by_loss]][:MOST_MISTAKES].astype(np.int32)
    return Predictions(labels.astype(np.int32), predicted, loss, worst, examples_at(worst))


def write_answers(folder: RunFolder, arm: str, answers: Predictions) -> None:
    """Write `predictions/ARM.npz`. Raise UserError if it cannot be written."""
    place = inside(folder.path, folder / PREDICTIONS)
    with cannot_write(place):
        place.mkdir(exist_ok=True)
    write_whole(place / f"{arm}.npz", lambda path: np.savez_compressed(path, **answers._asdict()))


def read_answers(run: Path, arm: str) -> Predictions | None:
    """Return the answers of an arm in a run's folder; None if there is no file, as in runs of earlier versions.

    Raise UserError if `write_answers` could not have made the file. Nothing in the file is unpickled.
    """
    path = inside(run, run / PREDICTIONS / f"{arm}.npz")
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
                raise ValueError("it is too large")
        with np.load(path, allow_pickle=False) as found:
            answers = Predictions(*(found[name] for name in Predictions._fields))
        examples, lanes, mistakes = len(answers.labels), len(answers.predicted), len(answers.worst)
        shapes = [array.shape for array in answers[:4]] == [
            (examples,),
            (lanes, examples),
            (lanes, examples),
            (mistakes,),
        ]
        kinds = [array.dtype.kind for array in answers] in (list("iifii"), list("iifiu"), list("iifif"))
        within = mistakes == 0 or 0 <= answers.worst.min() <= answers.worst.max() < examples
        numbers = answers.labels.min(initial=0) >= 0 and answers.predicted.min(initial=-1) >= -1
        if not (shapes and kinds and within and numbers and len(answers.worst_examples) == mistakes):
            raise ValueError("its arrays do not fit together")
    except UNREADABLE as error:
        raise UserError(f"{path} holds no answers: {error}") from error
    return answers
