"""The answers of an arm's models: what is kept of them, and what is believed of a file."""

from __future__ import annotations

import numpy as np
import pytest

from cnnlib.errors import UserError
from cnnlib.runs.folder import RunFolder
from cnnlib.runs.predictions import answers_of, read_answers, write_answers

LABELS = np.array([0, 1, 2, 1])
PREDICTED = np.array([[0, 2, 0, 1], [0, 2, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
LOSS = np.array([[9.0, 2.0, 5.0, 0.1], [9.0, 2.0, 5.0, 0.1], [9.0, 2.0, 5.0, 0.1], [np.nan, np.nan, np.nan, np.nan]])
DIVERGED = np.array([False, False, False, True])


def answers():
    return answers_of(LABELS, np.arange(8, dtype=np.uint8).reshape(4, 2, 1).__getitem__, PREDICTED, LOSS, DIVERGED)


def test_mistakes_of_most_lanes_come_first_by_loss_and_diverged_lanes_do_not_count():
    found = answers()
    assert found.worst.tolist() == [2, 1]  # the first example has the highest loss, but all lanes are right
    assert found.worst_examples[:, :, 0].tolist() == [[4, 5], [2, 3]]
    assert found.predicted[3].tolist() == [-1] * 4 and np.isnan(found.loss[3]).all()
    none = answers_of(LABELS, np.zeros((4, 2, 1)).__getitem__, PREDICTED, LOSS, np.ones(4, bool))
    assert none.worst.shape == (0,) and (none.predicted == -1).all()


def test_answers_are_read_back(tmp_path):
    with RunFolder(tmp_path) as held:
        write_answers(held, "arm", answers())
    found = read_answers(tmp_path, "arm")
    assert found is not None
    for name, expected in answers()._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), expected)
    assert read_answers(tmp_path, "other") is None


@pytest.mark.parametrize("damage", ["junk", "cut", "pickle", "shapes", "index"])
def test_a_file_that_is_no_answers_is_one_error(tmp_path, damage):
    (tmp_path / "predictions").mkdir()
    path = tmp_path / "predictions" / "arm.npz"
    content = answers()._asdict()
    if damage == "pickle":
        content["labels"] = np.array([{}, {}, {}, {}], object)
    elif damage == "shapes":
        content["loss"] = content["loss"][:, :-1]
    elif damage == "index":
        content["worst"] = np.array([2, 9], np.int32)
    np.savez_compressed(path, **content)
    if damage == "junk":
        path.write_text("no archive")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="holds no answers"):
        read_answers(tmp_path, "arm")
