"""Streams of examples against examples on the device: the same models, the same results, and any session's end."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from cnnlib.config.schema import Arm, Augment, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data import stream
from cnnlib.data.declaration import Data
from cnnlib.errors import Stopped, UserError
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.predictions import read_answers
from cnnlib.runs.runner import run
from cnnlib.runs.session import Options
from cnnlib.spec.notation import parse_model
from cnnlib.train import feeds
from cnnlib.train.multihost import Hosts

EXPERIMENT = Experiment(
    arms=(Arm("conv", parse_model("avg:4 conv:4@3 relu dense:classes")),),
    data=Data("lines", validation=210),
    augment=Augment(shift=2, flip=True),
    optim=Optim("adam", schedule="cosine", learning_rate=(0.01,)),
    lanes=Lanes(seed=(3, 4)),
    epochs=2,
    batch_size=200,  # 18 of them a pass, and 190 examples are left over
    compile_cache=False,
    checkpoint=Checkpoint(every=0),
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of at most 5 batches: 4 of them a pass, of 4 or 5 batches."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1000 * 28 * 28)


def streamed(experiment, **change):
    return replace(experiment, data=replace(experiment.data, stream=True, **change))


def lanes_of(results):
    return {arm.name: arm.lanes for arm in results.arms}


@pytest.mark.slow
def test_a_stream_in_the_stored_order_trains_the_models_that_examples_on_the_device_do(tmp_path):
    experiment = replace(EXPERIMENT, reshuffle=False, passes=2)
    resident = run(experiment, "tiny", tmp_path / "resident", Watcher())
    chunked = run(streamed(experiment), "tiny", tmp_path / "streamed", Watcher())
    for name, lanes in lanes_of(resident).items():
        for own, other in zip(lanes_of(chunked)[name], lanes, strict=True):
            assert own.epochs == other.epochs == 2
            for key in ("test", "train", "validation"):
                for what, tolerance in (("loss", {"rel": 1e-5}), ("accuracy", {"abs": 1e-3})):
                    values = (getattr(one, f"{key}_{what}") for one in (own, other))
                    assert next(values) == pytest.approx(next(values), **tolerance)
    told = [
        [json.loads(line) for line in (tmp_path / place / "metrics.jsonl").read_text().splitlines()]
        for place in ("resident", "streamed")
    ]
    for own, other in zip(*told, strict=True):
        assert own["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    found = [read_answers(tmp_path / place, "conv") for place in ("resident", "streamed")]
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    assert (found[0].predicted == found[1].predicted).mean() > 0.999
    assert [arm.waited_seconds >= 0 for arm in chunked.arms] == [True]
    assert resident.arms[0].waited_seconds is None


@pytest.mark.slow
def test_each_lane_sees_each_example_once_a_pass_in_an_order_of_its_own(tmp_path):
    # Nothing is learned: what a pass comes to while it trains is what all examples come to.
    data = replace(EXPERIMENT.data, validation=200)  # 3,800 examples: no batch is left over
    still = replace(EXPERIMENT, augment=Augment(), data=data, epochs=1, optim=Optim(learning_rate=(0.0,)))
    run(streamed(still), "tiny", tmp_path / "still", Watcher())
    result = json.loads((tmp_path / "still" / "results.json").read_text())["arms"][0]
    for line in (tmp_path / "still" / "metrics.jsonl").read_text().splitlines():
        while_training, after = json.loads(line), result["lanes"][json.loads(line)["lane"]]
        assert while_training["train_accuracy"] == pytest.approx(after["train_accuracy"], abs=1e-9)
        assert while_training["train_loss"] == pytest.approx(after["train_loss"], rel=1e-5)
    # Lanes of one seed for the weights and two for the order differ by the order alone.
    lanes = Lanes(seed=(3,), order_seed=(5, 6))
    ordered = run(streamed(replace(still, lanes=lanes, optim=Optim("adam"))), "tiny", tmp_path / "order", Watcher())
    one, two = ordered.arms[0].lanes
    assert one.parameters_sha256 != two.parameters_sha256


class EndsAfter(Watcher):
    """Wants the run to end after an epoch."""

    def __init__(self, epoch):
        self.epoch, self.reached = epoch, False

    def epoch_ends(self, report):
        self.reached = self.reached or report.epoch == self.epoch


@pytest.mark.slow
def test_a_stream_goes_on_exactly_with_another_number_of_workers(tmp_path):
    experiment = streamed(replace(EXPERIMENT, epochs=3, checkpoint=Checkpoint(share=1.0)), validation=200)
    whole = run(experiment, "tiny", tmp_path / "whole", Watcher())
    for epoch in (1, 2):
        watcher = EndsAfter(epoch)
        with pytest.raises(Stopped, match=f"after epoch {epoch} of 3 of conv, which is saved"):
            run(experiment, "tiny", tmp_path / "cut", watcher, Options(resume=True), stop=lambda: watcher.reached)  # noqa: B023
        experiment = streamed(experiment, workers=2)
    resumed = run(experiment, "tiny", tmp_path / "cut", Watcher(), Options(resume=True))
    assert lanes_of(resumed) == lanes_of(whole)


@pytest.mark.slow
def test_a_lane_that_diverges_in_a_stream_keeps_what_it_had_and_the_other_goes_on(tmp_path):
    experiment = replace(EXPERIMENT, optim=Optim(learning_rate=(0.01, 9e8)))
    alone = replace(experiment, optim=Optim(learning_rate=(0.01,)))
    lanes = run(streamed(experiment), "tiny", tmp_path / "both", Watcher()).arms[0].lanes
    fine = run(streamed(alone), "tiny", tmp_path / "alone", Watcher()).arms[0].lanes
    assert [lane.status for lane in lanes] == ["ok", "ok", "diverged", "diverged"]
    assert [lane.epochs for lane in lanes] == [2, 2, 0, 0]
    for own, other in zip(lanes[:2], fine, strict=True):
        assert own.test_loss == pytest.approx(other.test_loss, rel=1e-5)


class Told(Watcher):
    """Remembers what it was told."""

    def __init__(self):
        self.texts = []

    def says(self, text):
        self.texts.append(text)


@pytest.mark.slow
def test_what_takes_too_much_of_the_memory_is_streamed_and_the_figure_told(tmp_path, monkeypatch):
    monkeypatch.setattr(feeds, "STREAM_SHARE", 0.5)
    monkeypatch.setattr("cnnlib.runs.runner.free_memory", lambda device: 6 * 2**20)
    watcher = Told()
    experiment = replace(EXPERIMENT, epochs=1)
    results = run(experiment, "tiny", tmp_path / "small", watcher)
    assert (
        "lines takes 3.7 MiB, more than 50% of the 6.0 MiB that are free: it is streamed "
        "(data.stream=false keeps it on the device)"
    ) in watcher.texts
    assert results.arms[0].waited_seconds is not None
    kept = run(replace(experiment, data=replace(experiment.data, stream=False)), "tiny", tmp_path / "kept", watcher)
    assert kept.arms[0].waited_seconds is None


@pytest.mark.slow
def test_what_takes_too_much_of_one_host_is_streamed_on_all(tmp_path, monkeypatch):
    monkeypatch.setattr(feeds, "STREAM_SHARE", 0.5)
    told = iter([6 * 2**20])  # by another one, of its memory; then of what it has for lanes, which is plenty
    monkeypatch.setattr(Hosts, "lowest", lambda hosts, number: min(number, next(told, number)))
    watcher = Told()
    results = run(replace(EXPERIMENT, epochs=1), "tiny", tmp_path, watcher)
    assert results.arms[0].waited_seconds is not None
    assert any("more than 50% of the 6.0 MiB that are free: it is streamed" in text for text in watcher.texts)


def test_examples_drawn_for_each_lane_cannot_be_streamed(tmp_path):
    with pytest.raises(
        UserError, match=r"arm conv: data\.train=500 draws examples for each lane, and all lanes see the"
    ):
        run(streamed(EXPERIMENT, train=500), "tiny", tmp_path / "run", Watcher())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_stream_where_it_began_without(tmp_path):
    experiment = replace(EXPERIMENT, epochs=1, checkpoint=Checkpoint(share=1.0))
    run(experiment, "tiny", tmp_path / "run", Watcher())
    with pytest.raises(UserError, match=r"same numbers: streamed was nothing, is lines; --force"):
        run(streamed(experiment), "tiny", tmp_path / "run", Watcher(), Options(resume=True))


class Small:
    """A machine that has room for nothing but chunks, or for all."""

    def __init__(self, monkeypatch):
        self.free = 0
        monkeypatch.setattr("cnnlib.runs.runner.free_memory", lambda device: self.free)


@pytest.mark.slow
def test_a_stream_that_memory_has_asked_for_goes_on_where_there_is_more(tmp_path, monkeypatch):
    experiment = replace(EXPERIMENT, checkpoint=Checkpoint(share=1.0))
    machine = Small(monkeypatch)
    whole = run(experiment, "tiny", tmp_path / "whole", Watcher())
    watcher = EndsAfter(1)
    with pytest.raises(Stopped):
        run(experiment, "tiny", tmp_path / "cut", watcher, stop=lambda: watcher.reached)
    machine.free = 2**40
    resumed = run(experiment, "tiny", tmp_path / "cut", Watcher(), Options(resume=True))
    assert resumed.arms[0].waited_seconds is not None and lanes_of(resumed) == lanes_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("is_first_streamed", [True, False])
def test_by_force_a_run_goes_on_with_a_stream_or_without(tmp_path, is_first_streamed):
    experiment = replace(EXPERIMENT, checkpoint=Checkpoint(share=1.0))
    kinds = [replace(experiment, data=replace(experiment.data, stream=kind)) for kind in (True, False)]
    first, then = kinds if is_first_streamed else kinds[::-1]
    watcher = EndsAfter(1)
    with pytest.raises(Stopped):
        run(first, "tiny", tmp_path, watcher, stop=lambda: watcher.reached)
    results = run(then, "tiny", tmp_path, Watcher(), Options(resume=True, force=True))
    assert [lane.epochs for lane in results.arms[0].lanes] == [2, 2]
    assert results.resumed[0].forced and any("streamed was" in text for text in results.resumed[0].changes)


@pytest.mark.slow
def test_seconds_of_training_are_without_those_of_validating(tmp_path, monkeypatch):
    validate, later = feeds.StreamedFeed.validate, 0.0

    def long(*arguments):
        nonlocal later
        later += 1000.0
        return validate(*arguments)

    clock = time.perf_counter
    monkeypatch.setattr(feeds.StreamedFeed, "validate", long)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + later)
    (arm,) = run(streamed(EXPERIMENT), "tiny", tmp_path, Watcher()).arms
    assert later == 2000.0 and 0 < arm.waited_seconds < 2 * arm.train_seconds_per_lane < 1000  # two lanes
