"""A whole run, small: files, schema, compilations, choices."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace

import jax
import made_results
import numpy as np
import pytest
from tiny_run import EXPERIMENT, Silent

from cnnlib.config.fields import from_dict
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Arm, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.data.sets import load
from cnnlib.errors import UserError
from cnnlib.ops import kernels
from cnnlib.report import summary
from cnnlib.runs.arm_results import chosen_setting, settings_of
from cnnlib.runs.folder import RunFolder
from cnnlib.runs.metrics import read_metrics
from cnnlib.runs.results import FORMAT, Accuracy, DataResult, read_results
from cnnlib.runs.runner import kernels_for, run
from cnnlib.runs.session import Options
from cnnlib.spec.notation import parse_model
from cnnlib.system import files
from cnnlib.train import sharding
from cnnlib.train.feeds import Resident
from cnnlib.train.programs import compile_programs, numbers_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run: its results, its folder, what its watcher saw, and how many programs were compiled."""
    folder, watcher, compiled = tmp_path_factory.mktemp("run"), Silent(), []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    results = run(EXPERIMENT, "tiny", folder, watcher, Options(check=False))  # tests/check/test_check.py has it
    return results, folder, watcher.told, len(compiled)


def test_results_hold_what_is_promised(finished):
    results, folder, _, _ = finished
    assert read_results(folder) == results and json.loads((folder / "results.json").read_text())["format"] == FORMAT
    assert results.experiment == "tiny"
    names = ("vertical", "horizontal", "diagonal")
    assert results.data == DataResult("lines", 3800, 200, 1000, names)
    assert results.device.platform == "cpu" and results.device.count >= 1 and results.device.kind
    assert set(results.versions) == {"python", "jax", "jaxlib", "flax", "optax", "cnnlib"}
    assert results.wall_seconds > 0
    assert [arm.name for arm in results.arms] == ["full", "conv"]
    assert [arm.connectivity for arm in results.arms] == ["full", "conv"]
    for arm, resolved in zip(results.arms, resolve(EXPERIMENT), strict=True):
        counts = resolved.count
        assert (arm.parameters, arm.connections, arm.macs) == (
            counts.parameters,
            counts.connections,
            counts.macs,
        )
        assert arm.compile_seconds > 0 and arm.train_seconds_per_lane > 0
        assert [(lane.seed, lane.learning_rate) for lane in arm.lanes] == [
            (3, 0.01),
            (4, 0.01),
            (3, 0.03),
            (4, 0.03),
        ]
        for lane in arm.lanes:
            assert lane.status == "ok" and lane.epochs == 2
            assert 0 <= lane.test_accuracy <= 1 and lane.test_loss > 0
            assert lane.test_accuracy * 1000 == pytest.approx(round(lane.test_accuracy * 1000))  # every example


def test_the_config_of_a_run_is_the_experiment(finished):
    results, folder, _, _ = finished
    assert from_dict(results.config, Experiment) == EXPERIMENT
    stored = json.loads((folder / "config.json").read_text())
    assert stored.pop("experiment") == "tiny" and from_dict(stored, Experiment) == EXPERIMENT


def test_settings_group_the_seeds_and_validation_chooses_among_them(finished):
    for arm in finished[0].arms:
        assert [setting.learning_rate for setting in arm.settings] == [0.01, 0.03]
        for number, setting in enumerate(arm.settings):
            lanes = arm.lanes[2 * number : 2 * number + 2]
            assert setting.test_accuracy.n == 2
            assert setting.test_accuracy.mean == pytest.approx(np.mean([lane.test_accuracy for lane in lanes]))
        best = max(arm.settings, key=lambda setting: setting.validation_accuracy)
        assert arm.settings[arm.chosen_setting] == best and arm.test_accuracy == best.test_accuracy


def test_metrics_have_a_line_an_epoch_and_lane(finished):
    results, folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(m["arm"], m["epoch"], m["lane"]) for m in lines] == [
        (arm, epoch, lane) for arm in ("full", "conv") for epoch in (1, 2) for lane in range(4)
    ]
    last = [m for m in lines if m["epoch"] == 2]
    for metric, lane in zip(last, [lane for arm in results.arms for lane in arm.lanes], strict=True):
        assert metric["validation_accuracy"] == lane.validation_accuracy
        assert {"train_loss", "train_accuracy", "validation_loss", "seed", "learning_rate", "status"} <= set(metric)


def test_each_program_of_an_arm_compiles_once(finished):
    # initialise, epoch, validate, predict, fit: two arms, two epochs, four lanes; and a copy of the flags.
    assert finished[3] == 2 * 5 + 1


def test_the_watcher_is_told_in_order(finished):
    (said, text), *told = finished[2]
    assert said == "says" and "lines: 3,800 training examples of 28x28x1" in text
    kinds = [what[0] for what in told]
    assert kinds == ["begins"] * 2 + ["trains", "epoch", "epoch", "ends"] * 2
    assert told[0] == ("begins", "full", 4, 2)


@pytest.mark.slow
def test_without_validation_there_is_none_and_nothing_is_chosen(tmp_path):
    experiment = Experiment(**{**vars(EXPERIMENT), "data": Data("lines"), "epochs": 1, "arms": EXPERIMENT.arms[:1]})
    (arm,) = run(experiment, "tiny", tmp_path, Silent()).arms
    assert arm.chosen_setting is None and arm.test_accuracy == Accuracy(None, (None, None), 0)
    assert arm.settings[0].test_accuracy.n == 2
    assert {line.validation_accuracy for line in read_metrics(tmp_path / "metrics.jsonl")} == {None}


@pytest.mark.once
def test_a_diverged_lane_is_told_and_left_out_of_the_mean(tmp_path):
    deep = Arm("deep", parse_model("avg:4 dense:8 dense:8 dense:classes"))  # without ReLU nothing can die in peace
    changes = {"arms": (deep,), "optim": Optim("sgd", learning_rate=(0.01, 1e8))}
    experiment = Experiment(**{**vars(EXPERIMENT), **changes})
    (arm,) = run(experiment, "tiny", tmp_path, Silent()).arms
    assert [lane.status for lane in arm.lanes] == ["ok", "ok", "diverged", "diverged"]
    gone = arm.lanes[2]
    assert gone.test_accuracy is None and gone.test_loss is None and gone.epochs < 2
    assert arm.settings[1].diverged == 2 and arm.settings[1].test_accuracy.n == 0
    assert arm.chosen_setting == 0
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "results.json").read_text()


def test_a_setting_is_rated_by_its_lanes_that_are_ok_and_by_those_that_are_not():
    rates = ((0.1, 0.7), (0.1, 0.8), (0.3, 0.9), (0.3, None))
    settings = settings_of([made_results.lane(0, accuracy, learning_rate=rate) for rate, accuracy in rates])
    assert settings[1].validation_accuracy == 0.9 and settings[1].test_accuracy.n == 1
    assert chosen_setting(settings) == 0  # the other is better on average, but lost a lane


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"batch_size": 3801}, "batch_size=3801 is larger than the training data: lines has 3800"),
        ({"arms": (Arm("a", parse_model("conv:2@29:valid dense:classes")),)}, "arm a: layer 0"),
        ({"arms": (Arm("a", parse_model("dense:4")),)}, "arm a: its output is 4, lines has 3 classes"),
        ({"arms": (Arm("a", parse_model("conv:3@28:valid")),)}, "arm a: its output is 1x1x3"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(change, part, tmp_path):
    with pytest.raises(UserError) as error:
        run(Experiment(**{**vars(EXPERIMENT), **change}), "tiny", tmp_path / "out", Silent())
    assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_arm_that_does_not_fit_in_the_memory_is_named(tmp_path):
    huge = Arm("huge", parse_model("dense:99999999999 dense:classes"))  # 300 TB
    with pytest.raises(UserError, match=r"arm huge: 2 lanes of 78,799,999,999,215 parameters need 880,658\.6 GiB"):
        run(Experiment(**{**vars(EXPERIMENT), "arms": (huge,), "optim": Optim()}), "tiny", tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_the_device_trains_the_next_epoch_while_the_sums_of_one_are_fetched(tmp_path, monkeypatch):
    order = []

    class Watched(Silent):
        def epoch_ends(self, report):
            order.append(f"told {report.epoch}")

    def compiled(*arguments):
        made = compile_programs(*arguments)

        def epoch(*arguments):
            order.append("dispatched")
            return made.epoch(*arguments)

        return made._replace(epoch=epoch)

    monkeypatch.setattr("cnnlib.runs.compiled.compile_programs", compiled)
    run(replace(EXPERIMENT, epochs=3, arms=EXPERIMENT.arms[:1]), "tiny", tmp_path, Watched())
    assert order == ["dispatched", "dispatched", "told 1", "dispatched", "told 2", "told 3"]


@pytest.mark.once
def test_every_line_of_metrics_is_of_its_epoch(finished):
    # The same epochs one after another, each waited for before the next: nothing can be mixed up.
    _, folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    data = load(EXPERIMENT.data)
    feed = Resident(data, jax.devices()[:1])
    splits = feed.splits
    for arm in resolve(EXPERIMENT):
        numbers = numbers_of(arm)
        made = compile_programs(arm, feed, jax.devices()[:1])
        states, _ = made.initialize(numbers)
        for epoch in (1, 2):
            states, sums = jax.block_until_ready(made.epoch(states, numbers, splits["train"]))
            validation = jax.device_get(made.validate(states.parameters, states.statistics, splits["validation"]))
            told = [line for line in lines if (line["arm"], line["epoch"]) == (arm.name, epoch)]
            assert [line["train_loss"] for line in told] == list(sums.loss / sums.examples)
            assert [line["validation_loss"] for line in told] == list(validation.loss / validation.examples)
            assert [line["validation_accuracy"] for line in told] == list(validation.correct / validation.examples)


@pytest.mark.once
def test_arms_of_equal_shapes_share_their_programs(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "cnnlib.runs.compiled.compile_programs", lambda *a: made.append(a[0].name) or compile_programs(*a)
    )
    model = EXPERIMENT.arms[0].model
    arms = (Arm("one", model), EXPERIMENT.arms[1], Arm("two", model))
    one, _, two = run(replace(EXPERIMENT, arms=arms, epochs=1), "tiny", tmp_path, Silent()).arms
    assert made == ["one", "conv"]
    assert one.lanes == two.lanes  # and nothing of the first is left in the second


@pytest.mark.slow
def test_a_profile_has_a_trace_of_each_arm_and_changes_no_result(finished, tmp_path):
    watcher = Silent()
    results = run(EXPERIMENT, "tiny", tmp_path / "out", watcher, Options(check=False, profile=True))
    for arm, plain in zip(results.arms, finished[0].arms, strict=True):
        (trace,) = (tmp_path / "out" / "profile" / arm.name).rglob("perfetto_trace.json.gz")
        assert len(gzip.decompress(trace.read_bytes())) > 1000
        said = [text for kind, *texts in watcher.told if kind == "says" for text in texts]
        assert f"profile of {arm.name}: open {trace} at https://ui.perfetto.dev" in said
        assert [lane.test_loss for lane in arm.lanes] == [lane.test_loss for lane in plain.lanes]


def test_the_user_is_told_where_convolutions_are_slow(monkeypatch):
    arms = resolve(EXPERIMENT)
    monkeypatch.setattr(kernels, "register", lambda: "there is no C++ compiler (c++)")
    monkeypatch.delenv("CNNLIB_KERNELS", raising=False)
    watcher = Silent()
    assert kernels_for(arms, jax.devices()[0], watcher) == "xla"
    ((_, text),) = watcher.told[-1:]
    assert text.startswith("there is no C++ compiler (c++): convolutions run on XLA's own kernels")
    monkeypatch.setattr(kernels, "is_compiled", lambda: False)
    monkeypatch.setattr(kernels, "not_kept", lambda: "/shared can be changed by others")
    assert kernels_for(arms, jax.devices()[0], watcher) == "xla"
    assert watcher.told[-2][1] == (
        "compiling the convolutions for this processor, for this process only: /shared can be changed by others"
    )
    silent = Silent()
    monkeypatch.setenv("CNNLIB_KERNELS", "xla")  # as asked for
    assert kernels_for(arms, jax.devices()[0], silent) == "xla" and not silent.told
    assert kernels_for(arms[:1], jax.devices()[0], silent) == "xla" and not silent.told
    monkeypatch.setenv("CNNLIB_KERNELS", "bogus")
    with pytest.raises(UserError, match="CNNLIB_KERNELS=bogus"):
        kernels_for(arms[:1], jax.devices()[0], silent)  # although full nets run on neither


def make_room(path):
    with RunFolder(path) as held:
        return held.make_room()


def test_an_earlier_run_in_the_same_folder_is_kept(tmp_path):
    (tmp_path / "results.json").write_text("old")
    (tmp_path / "mine.txt").write_text("not ours")
    place = make_room(tmp_path)
    assert place is not None and (tmp_path / "earlier").is_dir()
    (kept,) = (tmp_path / "earlier").rglob("results.json")
    assert kept.read_text() == "old" and not (tmp_path / "results.json").exists()
    assert (tmp_path / "mine.txt").read_text() == "not ours"
    (tmp_path / "results.json").write_text("newer")
    make_room(tmp_path)
    assert sorted(path.read_text() for path in (tmp_path / "earlier").rglob("results.json")) == ["newer", "old"]


def test_a_link_that_leads_nowhere_is_moved_aside(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "gone" / "file")
    assert make_room(tmp_path) is not None
    assert not (tmp_path / "metrics.jsonl").is_symlink()


def test_a_platform_that_is_not_there_is_a_user_error(monkeypatch):
    def fails():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fails)
    with pytest.raises(UserError, match="JAX finds no device"):
        sharding.devices()


@pytest.mark.slow
def test_metrics_say_what_results_say_of_a_lane_that_blows_up_in_its_last_step(tmp_path):
    deep = Arm("deep", parse_model("dense:50 dense:50 dense:50 dense:50 dense:50 dense:classes"))
    optim = Optim("sgd", learning_rate=(9e8,), momentum=(0.0,))
    changes = {"arms": (deep,), "optim": optim, "epochs": 1, "batch_size": 3800}
    (arm,) = run(Experiment(**{**vars(EXPERIMENT), **changes}), "tiny", tmp_path, Silent()).arms
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [lane.status for lane in arm.lanes] == ["diverged"] * 2
    assert all(line["validation_accuracy"] is None for line in lines)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        make_room(tmp_path / "file" / "run")


def test_a_file_that_fails_half_way_leaves_the_old_one_and_no_trace(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("old")

    def fails(beside):
        beside.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_whole(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_is_null_in_json():
    assert files.plain({"a": [math.nan, math.inf, 1.0], "b": (2, None)}) == {"a": [None, None, 1.0], "b": [2, None]}


@pytest.mark.slow
def test_results_say_how_sparse_lanes_with_an_l1_term_are(tmp_path):
    optim = Optim("sgd", learning_rate=(0.05,), l1=(0.0, 1e-3), l1_threshold=(50.0,))
    experiment = replace(EXPERIMENT, arms=EXPERIMENT.arms[1:], optim=optim, lanes=Lanes(seed=(3,)), epochs=1)
    (arm,) = run(experiment, "tiny", tmp_path / "out", Silent()).arms
    free, sparse = arm.lanes
    assert (free.l1, sparse.l1, sparse.l1_threshold) == (0.0, 1e-3, 50.0)
    assert free.sparsity == 0 and 0.05 < sparse.sparsity < 1
    # A share of the 36 + 588 kernel weights, biases left out.
    assert sparse.sparsity * 624 == pytest.approx(round(sparse.sparsity * 624))


def test_results_of_lanes_without_an_l1_term_say_nothing_of_it(finished):
    assert {lane.sparsity for arm in finished[0].arms for lane in arm.lanes} == {None}


@pytest.mark.slow
def test_the_three_readings_run_matched_and_freed(tmp_path):
    net = parse_model("avg:4 conv:4@3 relu max:2 dense:classes")
    arms = (
        Arm("conv", net),
        Arm("local", net, "local"),
        Arm("full", net, "full", start="conv"),
        Arm("wide", net, match="parameters:local"),
    )
    results = run(replace(EXPERIMENT, arms=arms, epochs=1), "readings", tmp_path / "out", Silent())
    found = {arm.name: arm for arm in results.arms}
    assert [arm.connectivity for arm in found.values()] == ["conv", "local", "full", "conv"]
    assert found["local"].connections == found["conv"].connections < found["full"].connections
    assert [arm.start for arm in found.values()] == [None, None, "conv", None]
    match = found["wide"].match
    assert match.by == "parameters" and match.target == found["local"].parameters
    assert match.value == found["wide"].parameters and found["conv"].match is None
    for name, arm in found.items():
        for lane in arm.lanes:
            assert lane.status == "ok"
            if name in ("conv", "wide"):
                assert lane.distance_from_conv is None
            else:
                assert 0 < lane.distance_from_conv < 1
    # One epoch does not take a net that began as a convolution as far as one that never was.
    far, near = (min(lane.distance_from_conv for lane in found[name].lanes) for name in ("local", "full"))
    assert near < far
    assert f"wide has widths x {match.width:.3g} for {match.target:,} parameters" in summary.caption(results)
