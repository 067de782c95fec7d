"""Every arm of every experiment, compiled with and without the CPU's library fusions: do the numbers agree?

XLA's CPU compiler hands some products and sums to a library (YNNPACK). A fusion that computes wrong numbers shows here
as an arm whose losses differ by more than rounding; one that crashes ends the process after the arm before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import experiments  # noqa: F401  # registers every experiment
from benchmarks.timing import Table
from cnnlib import evaluation, train
from cnnlib.config import EXPERIMENTS, Data, Experiment, override
from cnnlib.data import DataSet, load
from cnnlib.models import Statistics
from cnnlib.programs import evaluation_batch, numbers_of, preferred_at_a_time, recipe_of
from cnnlib.resolve import TrainedArm, resolve
from cnnlib.train import Examples

NO_FUSIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Options of the compiler that leave all products and sums to XLA itself; jaxlib has them from 0.9.2 on."""
FUSION = "__ynn_fusion"
"""In the text of a compiled program, where the library computes."""


def measure(
    lanes: Sequence[int],
    steps: int,
    only: str = "",
    overrides: Sequence[str] = (),
    chosen: Callable[[Sequence[TrainedArm]], Sequence[TrainedArm]] = tuple,
) -> Iterator[Table]:
    """Train every arm for one short epoch and test it, with and without library fusions.

    Args:
        lanes: Numbers of lanes; 0 is the number that the experiment declares.
        steps: Steps of the epoch; fewer where an arm has fewer examples.
        only: The one experiment to look at; empty means all.
        overrides: Further fields of the experiments, such as `data.name=mnist5k`.
        chosen: Takes the arms of an experiment and returns those to look at; by default all.

    Yields:
        A table per arm, a row per number of lanes: fusions in its programs, the largest difference of a loss relative
        to the largest loss, and milliseconds of the epoch with and without fusions.
    """
    for name in EXPERIMENTS:
        registered = EXPERIMENTS.get(name)
        if only not in ("", name) or not isinstance(registered, Experiment):
            continue
        loaded: dict[Data, DataSet] = {}
        for arm in chosen(resolve(override(registered, overrides))):
            if arm.data not in loaded:
                loaded[arm.data] = load(arm.data)
            data = loaded[arm.data]
            title = f"{name}, arm {arm.name}, {steps} steps"
            yield Table(title, [compared(arm, data, count or len(arm.lanes), steps) for count in lanes])


def compared(arm: TrainedArm, data: DataSet, lanes: int, steps: int) -> dict[str, Any]:
    """The row of an arm with so many lanes."""
    one = arm.experiment
    kept = min(steps * one.batch_size, one.data.train or len(data.train.y))
    short = replace(one, data=replace(one.data, train=kept), passes=1, epochs=1)
    recipe = recipe_of(replace(arm, experiment=short))
    numbers = jax.tree.map(lambda column: np.resize(column, lanes), numbers_of(arm))
    numbers = numbers._replace(seed=np.arange(lanes, dtype=np.uint32), order_seed=np.arange(lanes, dtype=np.uint32))
    at_a_time = preferred_at_a_time(arm.model.connectivity, lanes, jax.devices()[0].platform)
    training, test = (Examples(split.x, split.y, data.mean, data.deviation) for split in (data.train, data.test))
    states = jax.jit(train.over_lanes(train.initialize(recipe), at_a_time=1))(numbers)
    epoch = jax.jit(train.over_lanes(train.epoch(recipe), at_a_time, lane_arguments=2)).lower(states, numbers, training)
    predict = train.over_lanes(evaluation.predict(recipe, evaluation_batch(arm)), at_a_time, lane_arguments=2)
    tested = jax.jit(predict).lower(states.parameters, states.statistics, test)
    found, fusions = [], 0
    for options in (None, NO_FUSIONS):
        programs = [lowered.compile(options) for lowered in (epoch, tested)]
        fusions += sum(program.as_text().count(FUSION) for program in programs)
        losses = outcome(programs, states, numbers, training, test)
        start = time.perf_counter()
        jax.block_until_ready(programs[0](states, numbers, training))
        found.append((losses, 1e3 * (time.perf_counter() - start)))
    (with_fusions, with_ms), (without, without_ms) = found
    return {
        "lanes": lanes,
        "fusions": fusions,
        "difference": f"{np.abs(with_fusions - without).max() / np.abs(without).max():.1e}",
        "with, ms": with_ms,
        "without, ms": without_ms,
    }


def outcome(
    programs: Sequence[Any], states: train.State, numbers: Any, training: Examples, test: Examples
) -> np.ndarray:
    """The training loss of each lane's epoch, then its loss on each test example."""
    epoch, predict = programs
    trained, sums = epoch(states, numbers, training)
    statistics: Statistics = trained.statistics
    answers = predict(trained.parameters, statistics, test)
    parts = [np.asarray(sums.loss / sums.examples)[:, None], np.asarray(answers.loss)]
    return np.concatenate(parts, axis=1).astype(np.float64)
