"""Each field of an experiment has an effect: changing it alone changes what the field promises to change."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from cnnlib.config.fields import flat, to_dict
from cnnlib.config.overrides import override
from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.runner import run
from cnnlib.spec.notation import parse_model

EXPERIMENT = Experiment(
    arms=(Arm("net", parse_model("avg:4 conv:2@3 relu dense:classes")),),
    data=Data("lines", train=400),
    optim=Optim(learning_rate=(0.05,)),
    lanes=Lanes(seed=(3,)),
    epochs=2,
    batch_size=100,
    compile_cache=False,
    devices=1,
    checkpoint=Checkpoint(every=0),
)
WEIGHTS = {
    "arms.net.model": ["arms.net.model=avg:7 dense:classes"],
    "arms.net.connectivity": ["arms.net.connectivity=local"],
    "arms.net.match": ["arms.net.match=parameters:500"],
    "arms.net.start": ["arms.net.connectivity=full", "arms.net.start=conv"],
    "arms.net.own": ["arms.net.batch_size=50"],
    "data.name": ["data.name=mnist5k"],
    "data.validation": ["data.validation=1000"],
    "data.train": ["data.train=500"],
    "data.shuffle_pixels": ["data.shuffle_pixels=7"],
    "augment.shift": ["augment.shift=1"],
    "augment.crop": ["augment.crop=24"],
    "augment.flip": ["augment.flip=true"],
    "optim.name": ["optim.name=adam"],
    "optim.schedule": ["optim.schedule=cosine"],
    "optim.learning_rate": ["optim.learning_rate=0.1"],
    "optim.momentum": ["optim.momentum=0.5"],
    "optim.weight_decay": ["optim.weight_decay=0.01"],
    "optim.label_smoothing": ["optim.label_smoothing=0.1"],
    "optim.l1": ["optim.l1=0.01"],
    "optim.l1_threshold": ["optim.l1=0.01", "optim.l1_threshold=5"],
    "lanes.seed": ["lanes.seed=4"],
    "lanes.order_seed": ["lanes.order_seed=9"],
    "epochs": ["epochs=3"],
    "passes": ["passes=2"],
    "batch_size": ["batch_size=50"],
    "reshuffle": ["reshuffle=false"],
    "compute_dtype": ["compute_dtype=bfloat16"],
}
"""Overrides after which the trained weights differ. All but the last are also set in the run to compare with."""
RATES = ["optim.learning_rate=0.1,0.2", "optim.momentum=0.5,0.9"]
SAVED = ["epochs=4", "checkpoint.every=1", "checkpoint.share=1"]
OTHERS = {
    "lanes.combine": ([*RATES, "lanes.combine=zip"], lambda results, _: len(results.arms[0].lanes)),
    "lanes.at_a_time": (["lanes.seed=3,4", "lanes.at_a_time=2"], lambda results, _: results.arms[0].lanes_at_a_time),
    "data.stream": (["data.train=none", "data.stream=true"], lambda results, _: results.arms[0].waited_seconds is None),
    "accumulate": (["accumulate=4"], lambda results, _: results.arms[0].memory_bytes),
    "precision": (["precision=highest"], lambda results, _: results.device.precision),
    "checkpoint.every": (["epochs=4", "checkpoint.share=1", "checkpoint.every=2"], lambda _, out: epochs_saved(out)),
    "checkpoint.share": (["epochs=4", "checkpoint.every=1", "checkpoint.share=1"], lambda _, out: epochs_saved(out)),
    "checkpoint.keep": ([*SAVED, "checkpoint.keep=1"], lambda _, out: epochs_saved(out)),
}
"""Overrides, and a function that takes the results and the folder of a run. Its value differs."""
ELSEWHERE = {
    "arms": "config/test_config.py::test_overrides_reach_every_kind_of_field",
    "data.data_dir": "data/test_tfds.py::test_tfds_data_dir_is_honoured_and_decoding_is_cached",
    "data.seed": "data/test_sets.py::test_lines_follow_their_seed",
    "data.workers": "train/test_feeds.py::test_a_stream_goes_on_exactly_with_another_number_of_workers",
    "remat": "nn/test_network.py::test_maps_that_are_computed_again_are_not_kept",
    "devices": "train/test_sharding.py::test_a_checkpoint_moves_from_eight_devices_to_one_to_four",
    "mesh": "train/test_sharding.py::test_devices_tell_each_other_of_shared_batches_and_of_nothing_else",
    "comparisons": "report/test_comparisons.py::test_planned_pairs_are_compared",
    "compile_cache": "train/test_programs.py::test_a_second_run_finds_its_programs_compiled",
}
"""Tests of the fields whose effect a small run does not show."""


def epochs_saved(out):
    return sorted(path.name for path in (out / "checkpoints").glob("*/*") if path.name.isdecimal())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A function that runs the experiment with overrides, once for equal ones, and returns its results and folder."""

    @functools.cache
    def with_overrides(*overrides):
        out = tmp_path_factory.mktemp("fields") / "run"
        return run(override(EXPERIMENT, overrides), "tiny", out, Watcher()), out

    return with_overrides


def weights(results, out):
    return [lane.parameters_sha256 for lane in results.arms[0].lanes]


@pytest.mark.slow
@pytest.mark.parametrize("field", [*WEIGHTS, *OTHERS])
def test_a_field_changes_what_it_promises(field, ran):
    overrides, seen = OTHERS[field] if field in OTHERS else (WEIGHTS[field], weights)
    assert seen(*ran(*overrides)) != seen(*ran(*overrides[:-1]))


def test_every_field_is_in_one_of_the_tables():
    fields = {name for name in flat(to_dict(EXPERIMENT)) if not name.startswith("wandb.")}  # tests/tracking has those
    assert {*WEIGHTS, *OTHERS, *ELSEWHERE} == fields
    folder = Path(__file__).parent.parent
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}", (folder / file).read_text(), re.MULTILINE)
