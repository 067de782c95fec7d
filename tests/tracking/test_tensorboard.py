"""Scalars for TensorBoard: what `metrics.jsonl` has, lane by lane, and the means."""

from __future__ import annotations

import struct

import made_results
import pytest
from made_results import arm, lane, record

from cnnlib.errors import UserError
from cnnlib.runs.callbacks import Beginning, EpochReport
from cnnlib.tracking import tensorboard
from cnnlib.tracking.tensorboard import TensorBoard


def line(seed, loss, status="ok"):
    return made_results.line(seed, 1, train_loss=loss, train_accuracy=0.5, status=status)


def scalars(folder):
    """Read the event files of a folder: records of length, checksum, content and checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    return found


def test_scalars_are_those_of_the_lines(tmp_path):
    board = TensorBoard()
    board.run_begins(Beginning(tmp_path, record(), False))
    for epoch, (first, second) in enumerate([(1.0, 3.0), (0.5, None)], 1):
        lines = [line(0, first), line(1, second, "ok" if second else "diverged")]
        board.epoch_ends(EpochReport("net", epoch, 2, 2, 0, {}, 1.0, lines))
    board.arm_ends("net", arm("net", [lane(0, 0.5)]), 0)
    board.close()
    folder = tmp_path / "tensorboard" / "net"
    assert {path.name for path in folder.iterdir()} == {"net seed 0", "net seed 1", "mean"}
    assert {key: value for key, value in scalars(folder / "net seed 0").items() if key[0] == "train_loss"} == {
        ("train_loss", 1): 1.0,
        ("train_loss", 2): 0.5,
    }
    assert ("train_loss", 2) not in scalars(folder / "net seed 1")
    mean = scalars(folder / "mean")
    assert mean["train_loss", 1] == 2.0 and mean["train_loss_std", 1] == pytest.approx(2**0.5)
    assert mean["train_loss", 2] == 0.5 and mean["lanes_ok", 2] == 1


def test_without_tensorboardx_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--tensorboard needs cnnlib's extra `tensorboard`"):
        TensorBoard()
