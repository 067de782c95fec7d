"""Every arm of every experiment, compiled with and without the CPU's library fusions: do the numbers agree?

XLA's CPU compiler hands some products and sums to a library (YNNPACK). A fusion that computes wrong numbers shows here
as an arm whose losses differ by more than rounding; one that crashes ends the process after the arm before it.
What the library does not compute is compiled fast rather than well: that changes neither what the library is given nor
what it does, and takes half the time.
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
"""Options of the compiler that leave all products and sums to XLA itself; jaxlib has them from 0.9.2 on."""
FAST: dict[str, Any] = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    # Later versions do not know the option. With level 0 it gives wrong gradients (tests/processes.py).
    FAST["xla_cpu_use_fusion_emitters"] = False
"""Options of the compiler with which the rest compiles in half the time."""
NUDGES = 8
"""How often initial weights are changed at random, for the largest difference that rounding may make."""
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
        A table per arm, a row per number of lanes: fusions in its programs, and the largest difference of a loss
        relative to the largest loss, by fusions and by initial weights that are changed by a millionth (`nudged`). An
        arm whose programs are those of an arm before it has no table.
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
    """The arm's recipe for one epoch of so many steps."""
    one = arm.experiment
    kept = min(steps * one.batch_size, one.data.train or len(data.train.y))
    short = replace(one, data=replace(one.data, train=kept), passes=1, epochs=1)
    return recipe_of(replace(arm, experiment=short))


def compared(arm: TrainedArm, recipe: step.Recipe, data: DataSet, lanes: int) -> dict[str, Any]:
    """The row of an arm with so many lanes."""
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
    """The same initial weights, each changed by up to a millionth of itself: what training makes of rounding."""
    random = np.random.RandomState(seed)
    change = lambda leaf: np.asarray(leaf) * (1 + 1e-6 * random.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)  # noqa: E731
    return states._replace(parameters=jax.tree.map(change, states.parameters))


def outcome(
    programs: Sequence[Any], states: step.State, numbers: Any, training: Examples, test: Examples
) -> np.ndarray:
    """The training loss of each lane's epoch, then its loss on each test example."""
    epoch, predict = programs
    trained, sums = epoch(states, numbers, training)
    statistics: Statistics = trained.statistics
    answers = predict(trained.parameters, statistics, test)
    parts = [np.asarray(sums.loss / sums.examples)[:, None], np.asarray(answers.loss)]
    return np.concatenate(parts, axis=1).astype(np.float64)
