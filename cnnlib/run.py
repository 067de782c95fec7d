"""run(experiment): the loop over arms and epochs, and what comes out of it."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from cnnlib import kernels, tracking, train
from cnnlib.config import Experiment, LaneNumbers, lane_numbers, to_dict
from cnnlib.data import DataSet, describe, load
from cnnlib.errors import UserError
from cnnlib.programs import Programs, check_parameters_fit, compile_cache, compile_programs, recipe_of
from cnnlib.resolve import ResolvedArm, resolve
from cnnlib.spec import Conv, Local, MaxPool, shape_text, walk
from cnnlib.stats import mean_interval
from cnnlib.train import Examples, Recipe, Sums


@runtime_checkable
class Watcher(Protocol):
    """Who is told how a run goes, such as the terminal."""

    def says(self, text: str) -> None:
        """Something that the user should know, in one line."""

    def arm_begins(self, name: str, lanes: int, epochs: int) -> None:
        """The arm's programs are to be compiled; every arm's are before the first one trains."""

    def training_begins(self, name: str) -> None: ...

    def epoch_ends(self, name: str, epoch: int, means: dict[str, float], diverged: int) -> None:
        """`means` over the lanes that have not diverged: `train_loss` and, if there is any, `validation_accuracy`."""

    def arm_ends(self, name: str) -> None: ...


def first_device() -> jax.Device:
    """The device that JAX runs on; raises UserError where it finds none of the platform that was asked for."""
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or "no such platform").splitlines()[0]
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}): {reason}"
        ) from error


def run(experiment: Experiment, name: str, out: Path, watcher: Watcher) -> dict[str, Any]:
    """Trains every lane of every arm and writes `config.json`, `metrics.jsonl` and `results.json` to `out`.

    Returns what `results.json` holds. Raises UserError, with nothing written, for whatever does not fit together or
    does not fit in the memory.
    """
    began = time.perf_counter()
    device = first_device()
    resolve(experiment, describe(experiment.data))
    data_set = load(experiment.data)
    arms = resolve(experiment, data_set.description)
    tracking.check_folder(out)
    for arm in arms:
        check_parameters_fit(experiment, arm, device)
    splits = on_device(data_set)
    shape = shape_text(data_set.description.input_shape)
    watcher.says(f"{name} on {data_set.description.name}: {len(data_set.train.y):,} training examples of {shape}")
    cpu_kernels = kernels_for(arms, device, watcher)
    lanes = lane_numbers(experiment)
    columns = zip(*lanes, strict=True)
    numbers = LaneNumbers(*(np.asarray(c, np.float32 if i else np.uint32) for i, c in enumerate(columns)))  # type: ignore[arg-type]
    programs: dict[Recipe, Programs] = {}
    with compile_cache(experiment.compile_cache, watcher.says):
        for arm in arms:
            watcher.arm_begins(arm.name, len(lanes), experiment.epochs)
            if (recipe := recipe_of(experiment, arm)) not in programs:
                programs[recipe] = compile_programs(experiment, arm, numbers, splits, device)
    earlier = tracking.open_folder(out)
    if earlier is not None:
        watcher.says(f"the files of an earlier run moved to {earlier}")
    config = to_dict(experiment)
    tracking.write_whole(
        out / "config.json", lambda path: path.write_text(tracking.to_json({"experiment": name, **config}))
    )
    with tracking.JsonLines(out / "metrics.jsonl") as metrics:
        arm_results = [
            run_arm(experiment, arm, programs[recipe_of(experiment, arm)], numbers, splits, metrics, watcher)
            for arm in arms
        ]
    results: dict[str, Any] = {
        "experiment": name,
        "config": config,
        "data": {"name": data_set.description.name, **data_set.description.counts},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "kernels": cpu_kernels,
        },
        "versions": tracking.versions(),
        "commit": tracking.commit(),
        "wall_seconds": time.perf_counter() - began,
        "arms": arm_results,
    }
    tracking.write_whole(out / "results.json", lambda path: path.write_text(tracking.to_json(results)))
    # As the file says it: what is not finite is None.
    plain: dict[str, Any] = tracking.plain(results)
    return plain


def kernels_for(arms: tuple[ResolvedArm, ...], device: jax.Device, watcher: Watcher) -> str:
    """Which kernels convolve and pool: `native` (kernels.cc) or `xla`; the user is told what takes time or costs it.

    Raises UserError for a `CNNLIB_KERNELS` that cannot be followed.
    """
    asked = kernels.asked()
    layers = [layer for arm in arms for layer in walk(arm.model.layers)]
    if device.platform != "cpu" or not any(isinstance(layer, (Conv, Local, MaxPool)) for layer in layers):
        return "xla"
    if asked != "xla" and not kernels.is_compiled():
        watcher.says("compiling the convolutions for this processor, once")
    choice = kernels.chosen()
    if (asked, choice) == ("auto", "xla"):
        watcher.says(f"{kernels.register()}: convolutions run on XLA's own kernels, 2 to 4 times as long")
    return choice


def on_device(data_set: DataSet) -> dict[str, Examples]:
    """The splits that have examples, on the default device, as stored (uint8 for images)."""
    splits = {"train": data_set.train, "validation": data_set.validation, "test": data_set.test}
    return {
        name: Examples(*jax.device_put((split.x, split.y, data_set.mean, data_set.deviation)))
        for name, split in splits.items()
        if len(split.y)
    }


def run_arm(
    experiment: Experiment,
    arm: ResolvedArm,
    programs: Programs,
    numbers: LaneNumbers,
    splits: dict[str, Examples],
    metrics: tracking.JsonLines,
    watcher: Watcher,
) -> dict[str, Any]:
    """Trains and tests all lanes of one arm; returns its part of `results.json`."""
    lanes = lane_numbers(experiment)
    watcher.training_begins(arm.name)
    states = programs.initialize(numbers)
    jax.block_until_ready(states)  # type: ignore[no-untyped-call]
    train_seconds, idle_since = 0.0, time.perf_counter()
    validation: Sums | None = None

    def dispatch(states: train.State) -> tuple[train.State, EpochSums]:
        """Sets an epoch going; its sums outlive the states, which the next epoch overwrites."""
        states, sums = programs.epoch(states, numbers, splits["train"])
        validated = programs.validate and programs.validate(states.parameters, splits["validation"])
        return states, EpochSums(sums, jnp.copy(states.diverged), validated)

    states, going = dispatch(states)
    for epoch in range(1, experiment.epochs + 1):
        ended = going
        # The device has the next epoch to do while this one's sums are fetched, written and shown.
        if epoch < experiment.epochs:
            states, going = dispatch(states)
        sums, diverged = jax.device_get((ended.train, ended.diverged))
        seconds = time.perf_counter() - idle_since
        validation = jax.device_get(ended.validation)
        idle_since = time.perf_counter()
        train_seconds += seconds
        columns_of = {"train": sums, "validation": validation}
        lines = [_metrics(columns_of, lane, bool(diverged[lane])) for lane in range(len(lanes))]
        for lane, (lane_number, line) in enumerate(zip(lanes, lines, strict=True)):
            metrics.write(
                {"arm": arm.name, "lane": lane, **lane_number._asdict(), "epoch": epoch, **line, "seconds": seconds}
            )
        fine = [line for line in lines if line["status"] == "ok"]
        means = {key: float(np.mean([line[key] for line in fine])) for key in lines[0] if key != "status" and fine}
        watcher.epoch_ends(arm.name, epoch, means, len(lines) - len(fine))
    test = jax.device_get(programs.test(states.parameters, splits["test"]))
    watcher.arm_ends(arm.name)
    lane_results = _lane_results(lanes, test, validation, states)
    if programs.distance is not None:
        distances = jax.device_get(programs.distance(states.parameters))
        for result, distance in zip(lane_results, distances, strict=True):
            result["distance_from_conv"] = float(distance)
    settings = _settings(lane_results)
    return {
        "name": arm.name,
        "connectivity": arm.model.connectivity,
        "model": str(arm.model),
        "parameters": arm.count.parameters,
        "connections": arm.count.connections,
        "macs": arm.count.macs,
        "match": arm.match and arm.match.plain(),
        "start": arm.start,
        "compile_seconds": programs.compile_seconds,
        "lanes_at_a_time": programs.at_a_time,
        "memory_bytes": programs.memory_bytes,
        "train_seconds_per_lane": train_seconds / len(lanes),
        **_headline(settings),
        "settings": settings,
        "lanes": lane_results,
    }


class EpochSums(NamedTuple):
    """What one epoch leaves on the device to be reported, an entry a lane."""

    train: Sums
    diverged: jax.Array
    validation: Sums | None


def _metrics(sums: dict[str, Sums | None], lane: int, diverged: bool) -> dict[str, Any]:
    """One lane's means; of a lane that has diverged, or has a loss that is not finite, nothing but that."""
    given = {part: part_sums for part, part_sums in sums.items() if part_sums is not None}
    gone = diverged or not all(np.isfinite(part_sums.loss[lane]) for part_sums in given.values())
    means: dict[str, Any] = {}
    for part, part_sums in given.items():
        count = part_sums.examples[lane]
        means[f"{part}_loss"] = math.nan if gone else float(part_sums.loss[lane] / count)
        means[f"{part}_accuracy"] = math.nan if gone else float(part_sums.correct[lane] / count)
    return {**means, "status": "diverged" if gone else "ok"}


def _lane_results(
    lanes: tuple[LaneNumbers, ...], test: Sums, validation: Sums | None, states: train.State
) -> list[dict[str, Any]]:
    epochs, diverged = np.asarray(states.epochs), np.asarray(states.diverged)
    results = []
    for lane, numbers in enumerate(lanes):
        means = _metrics({"test": test, "validation": validation}, lane, bool(diverged[lane]))
        results.append({**numbers._asdict(), **means, "epochs": int(epochs[lane])})
    return results


def _settings(lanes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lanes grouped by their traced numbers, seeds aside, with the test accuracy of the seeds that are ok."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    names = [name for name in LaneNumbers._fields if name != "seed"]
    for lane in lanes:
        groups[tuple(lane[name] for name in names)].append(lane)
    settings = []
    for values, members in groups.items():
        fine = [lane for lane in members if lane["status"] == "ok"]
        test = mean_interval([lane["test_accuracy"] for lane in fine])
        validation = mean_interval([lane["validation_accuracy"] for lane in fine if "validation_accuracy" in lane])
        settings.append(
            {
                **dict(zip(names, values, strict=True)),
                "test_accuracy": {"mean": test.mean, "ci95": [test.low, test.high], "n": test.n},
                "validation_accuracy": validation.mean,
                "diverged": len(members) - len(fine),
            }
        )
    return settings


def _headline(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The arm's test accuracy: that of its only setting, or of the one that validation chooses.

    The rule: fewest diverged lanes, then highest mean validation accuracy. Without validation examples nothing is
    chosen, and the arm's accuracy is null: a choice by test accuracy would be no measurement.
    """
    chosen: int | None = 0
    if len(settings) > 1:
        ranks = [
            (s["diverged"], -s["validation_accuracy"]) if s["validation_accuracy"] is not None else None
            for s in settings
        ]
        rated = [(rank, index) for index, rank in enumerate(ranks) if rank is not None]
        chosen = min(rated)[1] if rated else None
    nothing = {"mean": None, "ci95": [None, None], "n": 0}
    return {"chosen_setting": chosen, "test_accuracy": nothing if chosen is None else settings[chosen]["test_accuracy"]}
