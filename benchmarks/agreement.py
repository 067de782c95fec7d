"""Compile every arm of every experiment with and without the CPU's library fusions, and compare the losses.

XLA's CPU compiler computes some products and sums with a library (YNNPACK). Such a library call is named a fusion. If a
fusion computes wrong numbers, the losses with and without fusions differ by more than rounding. If a fusion crashes,
the process ends, and the last printed table belongs to the previous arm. To save half of the compile time, all other
code is compiled with fewer optimisations. This changes neither the inputs of the library nor its computations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Table
from cnnlib.config.overrides import override
from cnnlib.config.resolve import TrainedArm, resolve
from cnnlib.config.schema import EXPERIMENTS, Experiment
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, load
from cnnlib.nn.network import Statistics
from cnnlib.train import evaluate, step
from cnnlib.train.programs import evaluation_batch, numbers_of, preferred_at_a_time, recipe_of
from cnnlib.train.step import Examples

NO_FUSIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiler options that make XLA compute all products and sums itself. jaxlib 0.9.2 and later have these options."""
FAST: dict[str, Any] = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    # Later versions lack this option. With it, optimisation level 0 gives wrong gradients (see tests/processes.py).
    FAST["xla_cpu_use_fusion_emitters"] = False
"""Compiler options that halve the compile time of all code outside the fusions."""
NUDGES = 8
"""Number of trainings with randomly changed initial weights. They show how large a difference rounding can cause."""
FUSION = "__ynn_fusion"
"""Text that marks a library call in a compiled program."""


def measure(
    lanes: Sequence[int],
    steps: int,
    only: str = "",
    overrides: Sequence[str] = (),
    chosen: Callable[[Sequence[TrainedArm]], Sequence[TrainedArm]] = tuple,
) -> Iterator[Table]:
    """Train every arm for one short epoch and test the arm. Repeat this with library fusions and without.

    Args:
        lanes: Lane counts to test; 0 means the number that the experiment declares.
        steps: Steps of the epoch; fewer if an arm has fewer examples.
        only: The only experiment to test; empty means all.
        overrides: Overrides of the experiments, such as `data.name=mnist5k`.
        chosen: Function from the arms of an experiment to the arms to test; by default all.

    Yields:
        One table per arm with one row per lane count. `fusions` is the number of fusions. `difference` is the largest
        loss difference with and without fusions, relative to the largest loss. `nudged` is the largest relative loss
        difference between two runs whose initial weights differ by up to a millionth. An arm gets no table if its
        programs are those of an earlier arm.
    """
    seen: set[tuple[Any, ...]] = set()
    for name in EXPERIMENTS:
        registered = EXPERIMENTS.get(name)
        if only not in ("", name) or not isinstance(registered, Experiment):
            continue
        loaded: dict[Data, DataSet] = {}
        for arm in chosen(resolve(override(registered, overrides))):
            if arm.data not in loaded:
                loaded[arm.data] = load(arm.data)
            data = loaded[arm.data]
            recipe, rows = short_recipe(arm, data, steps), []
            for count in (count or len(arm.lanes) for count in lanes):
                program = (recipe, data.train.x.shape, data.test.x.shape, evaluation_batch(arm), count)
                if program not in seen:
                    seen.add(program)
                    rows.append(compared(arm, recipe, data, count))
            if rows:
                yield Table(f"{name}, arm {arm.name}, {steps} steps", rows)


def short_recipe(arm: TrainedArm, data: DataSet, steps: int) -> step.Recipe:
    """Return the arm's recipe for one epoch of `steps` steps."""
    one = arm.experiment
    kept = min(steps * one.batch_size, one.data.train or len(data.train.y))
    short = replace(one, data=replace(one.data, train=kept), passes=1, epochs=1)
    return recipe_of(replace(arm, experiment=short))


def compared(arm: TrainedArm, recipe: step.Recipe, data: DataSet, lanes: int) -> dict[str, Any]:
    """Return the row of the table for an arm with `lanes` lanes."""
    numbers = jax.tree.map(lambda column: np.resize(column, lanes), numbers_of(arm))
    numbers = numbers._replace(seed=np.arange(lanes, dtype=np.uint32), order_seed=np.arange(lanes, dtype=np.uint32))
    at_a_time = preferred_at_a_time(arm.model.connectivity, arm.input_shape, lanes, jax.devices()[0].platform)
    training, test = (Examples(split.x, split.y, data.mean, data.deviation) for split in (data.train, data.test))
    states = jax.jit(step.over_lanes(step.initialize(recipe), at_a_time=1), compiler_options=FAST)(numbers)
    epoch = jax.jit(step.over_lanes(step.epoch(recipe), at_a_time, lane_arguments=2)).lower(states, numbers, training)
    predict = step.over_lanes(evaluate.predict(recipe, evaluation_batch(arm)), at_a_time, lane_arguments=2)
    tested = jax.jit(predict).lower(states.parameters, states.statistics, test)
    found, fusions = [], 0
    for options in (FAST, FAST | NO_FUSIONS):
        programs = [lowered.compile(options) for lowered in (epoch, tested)]
        fusions += sum(program.as_text().count(FUSION) for program in programs)
        found.append(outcome(programs, states, numbers, training, test))
    with_fusions, without = found
    nudges = [outcome(programs, nudged(states, seed), numbers, training, test) for seed in range(NUDGES)]
    difference, *rounding = (np.abs(one - without).max() / np.abs(without).max() for one in (with_fusions, *nudges))
    return {"lanes": lanes, "fusions": fusions, "difference": f"{difference:.1e}", "nudged": f"{max(rounding):.1e}"}


def nudged(states: step.State, seed: int) -> step.State:
    """Change each initial weight at random by up to a millionth of it, to show how training amplifies rounding."""
    random = np.random.RandomState(seed)
    change = lambda leaf: np.asarray(leaf) * (1 + 1e-6 * random.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)  # noqa: E731
    return states._replace(parameters=jax.tree.map(change, states.parameters))


def outcome(
    programs: Sequence[Any], states: step.State, numbers: Any, training: Examples, test: Examples
) -> np.ndarray:
    """Return one row per lane. A row has the mean training loss of the epoch, then the loss on each test example."""
    epoch, predict = programs
    trained, sums = epoch(states, numbers, training)
    statistics: Statistics = trained.statistics
    answers = predict(trained.parameters, statistics, test)
    parts = [np.asarray(sums.loss / sums.examples)[:, None], np.asarray(answers.loss)]
    return np.concatenate(parts, axis=1).astype(np.float64)
