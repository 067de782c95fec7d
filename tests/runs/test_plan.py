"""What a run is said to take before it runs."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from made_results import arm, lane, results
from rich.console import Console

from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Arm, Experiment, Lanes
from cnnlib.data.declaration import Data
from cnnlib.runs import plan
from cnnlib.runs.plan import Rate, RateKeeper, cost_of, duration, known_rates, print_plan
from cnnlib.spec.notation import parse_model

ARM = Arm("full", parse_model("dense:100:nobias relu dense:classes:nobias"))
EXPERIMENT = Experiment(arms=(ARM,), data=Data("lines"), lanes=Lanes(seed=(0, 1)), epochs=3, batch_size=40)
(RESOLVED,) = resolve(EXPERIMENT)
MACS = (784 * 100 + 100 * 3) * 40


def test_time_is_that_of_the_nearest_known_step_of_the_same_connectivity():
    steps = 2 * 3 * 100
    near, far, other = Rate("full", 2 * MACS, 0.02), Rate("full", 100 * MACS, 0.5), Rate("conv", MACS, 9.0)
    assert cost_of(RESOLVED, [near, far, other]).seconds == pytest.approx(steps * 0.01)
    assert cost_of(RESOLVED, [near, Rate("full", 2 * MACS, 0.04)]).seconds == pytest.approx(steps * 0.02)  # the latest
    unknown = cost_of(RESOLVED, [other])
    assert not unknown.is_measured and unknown.seconds == pytest.approx(steps * MACS / plan.USUAL_RATE)


def test_rates_of_a_run_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = {"macs": 1000, "batch_size": 4, "train_seconds_per_lane": 2.0}
    one, none = (arm("a", [lane(0, 0.5)], connectivity="full", steps=steps, **known) for steps in (50, 0))
    RateKeeper().run_ends(results(one, none))
    RateKeeper().run_ends(results(replace(one, connectivity="conv")))
    assert known_rates() == [Rate("full", 4000, 0.04), Rate("conv", 4000, 0.04)]
    with plan.rates_path().open("a") as file:
        file.write('{"connectivity": 3}\n{"connectivity": "conv", "macs": -1, "seconds": 1}\nno json')
    assert len(known_rates()) == 2


def test_runs_that_end_at_once_do_not_get_into_each_others_way(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = {"macs": 1000, "batch_size": 4, "steps": 50, "train_seconds_per_lane": 2.0}
    ended = results(arm("a", [lane(0, 0.5)], connectivity="full", **known))
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: RateKeeper().run_ends(ended), range(60)):
            pass  # raises what was raised
    kept = known_rates()
    assert kept and set(kept) == {Rate("full", 4000, 0.04)}
    assert [path.name for path in plan.rates_path().parent.iterdir()] == ["rates.jsonl"]


def test_the_plan_has_programs_lanes_steps_and_a_sum(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = io.StringIO()
    print_plan([RESOLVED], 1, Console(file=text, width=80))
    assert " 2   300 " in text.getvalue()  # lanes, steps
    assert "1 program, 2 lanes, about 1 s of training by the usual rate of 2 CPU cores" in text.getvalue()


def test_durations_are_for_people():
    assert [duration(s) for s in (0.4, 89.0, 90.0, 5399.0, 5400.0)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
