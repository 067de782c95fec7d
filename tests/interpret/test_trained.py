"""Models trained in memory: the numbers of `run`, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.data.sets import load
from cnnlib.errors import UserError
from cnnlib.interpret.activations import activations
from cnnlib.interpret.trained import train_models
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.runner import run
from cnnlib.spec.notation import parse_model

EXPERIMENT = Experiment(
    arms=(
        Arm("full", parse_model("avg:4 dense:8 relu dense:classes")),
        # A bias that a norm takes off again has a gradient of rounding alone, of which Adam makes steps like any other.
        Arm("conv", parse_model("avg:4 conv:4@3:nobias norm relu dense:classes")),
    ),
    data=Data("lines", validation=200),
    optim=Optim("adam", learning_rate=(0.01,)),
    lanes=Lanes(seed=(3, 4)),
    epochs=2,
    batch_size=200,
    compile_cache=False,
    checkpoint=Checkpoint(every=0),
)


@pytest.fixture(scope="module")
def models():
    return train_models(EXPERIMENT)


@pytest.mark.slow
def test_accuracies_are_those_of_a_run(models, tmp_path):
    nets, _ = models
    results = run(EXPERIMENT, "tiny", tmp_path, Watcher())
    for arm in results.arms:
        of_run = [lane.test_accuracy for lane in arm.lanes]
        assert [net.test_accuracy for net in nets[arm.name]] == pytest.approx(of_run, abs=2.1e-3)
        assert len(set(of_run)) > 1 and min(of_run) > 0.34  # something has been learned, by each lane its own


@pytest.mark.slow
def test_a_lane_is_the_model_that_its_seed_trains_alone(models):
    alone, _ = train_models(replace(EXPERIMENT, arms=EXPERIMENT.arms[1:], lanes=Lanes(seed=(4,))))
    of_two, (of_one,) = models[0]["conv"], alone["conv"]
    assert list(alone) == ["conv"] and set(of_one.statistics["layer_2"]) == {"mean", "variance"}
    same, other = (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), net[1:3], of_one[1:3])))
        for net in reversed(of_two)
    )
    assert same < 1e-3 < 0.1 < other


@pytest.mark.once
def test_a_net_answers_to_stored_examples_as_it_was_tested(models):
    nets, data = models
    for name in ("full", "conv"):
        for net in nets[name]:
            (scores,) = activations(net, data.test.x, (len(net.model.layers) - 1,))
            right = (scores.argmax(axis=1) == data.test.y).mean()
            assert right == pytest.approx(net.test_accuracy, abs=1.1e-3)
    net = nets["full"][0]
    seen = net.seen(data.train.x)
    assert seen.dtype == np.float32 and abs(seen.mean()) < 1e-3 and seen.std() == pytest.approx(1, abs=1e-3)
    assert len(data.train.y) == len(load(EXPERIMENT.data).train.y) == 3800


@pytest.mark.once
def test_what_cannot_be_trained_is_one_line():
    own = replace(EXPERIMENT, arms=(EXPERIMENT.arms[0], replace(EXPERIMENT.arms[1], own=("data.name=mnist5k",))))
    wild = replace(EXPERIMENT, arms=EXPERIMENT.arms[:1], optim=Optim("sgd", learning_rate=(1e8,)))
    large = replace(EXPERIMENT, arms=(Arm("vast", parse_model("dense:100000000 dense:classes")),))
    for experiment, told in (
        (own, "these arms have different ones"),
        (wild, "arm full: the lane of seed 3 has diverged"),
        (large, "arm vast: 2 lanes of"),
        (replace(EXPERIMENT, data=Data("nothing")), "no data set 'nothing'"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            train_models(experiment)
        assert "\n" not in str(caught.value)
