"""An experiment trained as jobs comes to what it comes to in one process, whatever dies on the way."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import made_results
import numpy as np
import pytest

from cnnlib.cli.main import main
from cnnlib.config.resolve import Part, resolve
from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.errors import Stopped, UserError
from cnnlib.launch import jobs, merge, ray_core
from cnnlib.launch.jobs import Launch, divided
from cnnlib.launch.local import LocalJobs
from cnnlib.launch.merge import merged, merged_answers, read_jobs
from cnnlib.launch.supervise import supervise
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.folder import RunFolder
from cnnlib.runs.predictions import Predictions, answers_of, read_answers
from cnnlib.runs.resume import FinishedArm
from cnnlib.runs.runner import run
from cnnlib.runs.session import Options
from cnnlib.spec.notation import parse_model
from cnnlib.system import machine

# An arm that is matched, and has fields of its own; two settings; seeds that are neither in order nor an even
# number. One lane at a time: with several, full nets agree to rounding only.
EXPERIMENT = Experiment(
    arms=(
        Arm("conv", parse_model("avg:4 conv:4@3 relu dense:classes")),
        Arm(
            "own-fields",
            parse_model("avg:4 dense:8 relu dense:classes"),
            match="parameters:conv",
            own=("epochs=1", "lanes.seed=9,5,7", "data.train=400"),
        ),
    ),
    data=Data("lines", validation=200),
    optim=Optim("adam", learning_rate=(0.01, 0.03)),
    lanes=Lanes(seed=(3, 1, 4), at_a_time=1),
    epochs=2,
    batch_size=200,
    devices=1,
    checkpoint=Checkpoint(every=0),
)


def test_jobs_are_arms_or_blocks_of_their_seeds():
    arms = resolve(EXPERIMENT)
    assert divided(arms, None) == divided(arms, 3) == ["conv", "own-fields"]
    assert divided(arms, 2) == ["conv-3..1", "conv-4..4", "own-fields-9..5", "own-fields-7..7"]
    parts = [Part.named(job).of(arms)[0] for job in divided(arms, 2)]
    assert [(arm.name, arm.experiment.lanes.seed, len(arm.lanes)) for arm in parts] == [
        ("conv", (3, 1), 4),
        ("conv", (4,), 2),
        ("own-fields", (9, 5), 4),
        ("own-fields", (7,), 2),
    ]
    for job in divided(arms, 1):
        assert str(Part.named(job)) == job


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be ARM or ARM-FIRST"),
        ("conv-1", "no arm 'conv-1'"),
        ("conv-8..9", "no lanes of seed 8, 9"),
        ("a..b", "must be"),
    ],
)
def test_parts_that_are_none_are_user_errors(text, message):
    with pytest.raises(UserError, match=message):
        Part.named(text).of(resolve(EXPERIMENT))


TIMES = ("compile_seconds", "train_seconds_per_lane", "memory_bytes")


def comparable(out):
    """All that a run has left behind, but for times."""
    results = json.loads((out / "results.json").read_text())
    for name in ("wall_seconds", "commit", "finished"):  # whoever develops may edit while tests run
        results.pop(name)
    for arm in results["arms"]:
        for name in TIMES:
            assert arm.pop(name) >= 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    answers = {arm["name"]: [array.tolist() for array in read_answers(out, arm["name"])] for arm in results["arms"]}
    files = sorted(path.name for path in out.iterdir())
    return results, [{key: value for key, value in line.items() if key != "seconds"} for line in lines], answers, files


@pytest.mark.slow
def test_blocks_of_seeds_are_merged_to_what_one_process_comes_to(tmp_path):
    run(EXPERIMENT, "tiny", tmp_path / "whole", Watcher())
    out = tmp_path / "run"
    with pytest.raises(UserError, match="there are no jobs in"):
        read_jobs(out)
    names = divided(resolve(EXPERIMENT), 2)
    for name in names[1:]:
        run(EXPERIMENT, "tiny", out / "jobs" / name, Watcher(), Options(part=Part.named(name)))
    with pytest.raises(UserError, match="arm conv: its jobs have other lanes than it has"):
        read_jobs(out)
    run(EXPERIMENT, "tiny", out / "jobs" / names[0], Watcher(), Options(part=Part.named(names[0])))
    record = out / "jobs" / names[0] / "run.json"
    right = record.read_text()
    record.write_text(right.replace('"jax": "', '"jax": "0.'))
    with pytest.raises(
        UserError, match=rf"job {names[0]} has computed something else than this run: jax was 0.*--force"
    ):
        run(EXPERIMENT, "tiny", out, Watcher(), Options(merged=read_jobs(out)))
    record.write_text(right.replace('"state": "finished"', '"state": "failed"'))
    with pytest.raises(UserError, match=rf"job {names[0]} is failed: only finished jobs are merged"):
        read_jobs(out)
    record.write_text(right)
    results = run(EXPERIMENT, "tiny", out, Watcher(), Options(merged=read_jobs(out)))
    assert comparable(out) == comparable(tmp_path / "whole") and results.resumed == ()
    assert set(json.loads((out / "run.json").read_text())["jobs"]) == set(names)
    # And it is a run like others.
    assert run(EXPERIMENT, "tiny", out, Watcher(), Options(resume=True)) == results


# Merging.


def lane(seed, rate, accuracy):
    return made_results.lane(seed, accuracy, learning_rate=rate)


def part_of(lanes, seconds, **change):
    known = {"compile_seconds": seconds, "memory_bytes": int(seconds), "train_seconds_per_lane": seconds}
    result = made_results.arm("full", lanes, lanes_at_a_time=len(lanes), **{**known, **change})
    lines = [made_results.line(n, epoch, seed=one.seed) for epoch in (1, 2) for n, one in enumerate(lanes)]
    return FinishedArm(result, tuple(lines), 1.0)


def two_parts():
    """Of seeds 3, 1 and 4 with two settings, the last lane diverged."""
    experiment = replace(EXPERIMENT, lanes=Lanes(seed=(3, 1, 4)), arms=EXPERIMENT.arms[:1])
    (arm,) = resolve(experiment)
    first = part_of([lane(3, 0.01, 0.5), lane(1, 0.01, 0.75), lane(3, 0.03, 1.0), lane(1, 0.03, 0.5)], 2.0)
    second = part_of([lane(4, 0.01, 0.25), lane(4, 0.03, None)], 5.0)
    return arm, first, second


def test_lanes_of_parts_go_where_the_whole_experiment_has_them():
    arm, first, second = two_parts()
    for parts in ([first, second], [second, first]):
        found = merged(arm, parts, 42.0)
        result = found.result
        assert [one.seed for one in result.lanes] == [3, 1, 4, 3, 1, 4] and found.wall_seconds == 42.0
        assert [one.learning_rate for one in result.lanes] == [0.01] * 3 + [0.03] * 3
        assert [setting.test_accuracy.n for setting in result.settings] == [3, 2]
        assert [setting.diverged for setting in result.settings] == [0, 1]
        assert result.chosen_setting == 0 and result.test_accuracy.mean == 0.5
        assert result.train_seconds_per_lane == pytest.approx((4 * 2.0 + 2 * 5.0) / 6)
        assert (result.compile_seconds, result.lanes_at_a_time, result.memory_bytes) == (7.0, 4, 5)
        assert [(line.epoch, line.lane) for line in found.lines] == [(e, n) for e in (1, 2) for n in range(6)]
        assert [line.seed for line in found.lines] == [3, 1, 4, 3, 1, 4] * 2


def test_parts_that_are_not_those_of_the_arm_are_refused():
    arm, first, second = two_parts()
    for parts in ([first], [first, first], [first, part_of([lane(9, 0.01, 0.5), lane(4, 0.03, 0.5)], 1.0)]):
        with pytest.raises(UserError, match="other lanes than it has"):
            merged(arm, parts, 1.0)
    with pytest.raises(UserError, match="disagree about model"):
        merged(arm, [first, part_of(second.result.lanes, 5.0, model="dense:4")], 1.0)


def test_answers_of_parts_are_those_of_all_lanes_with_the_worst_of_all(monkeypatch):
    arm, first, second = two_parts()
    chance = np.random.RandomState(0)
    labels, examples = chance.randint(0, 3, 200), chance.randint(0, 255, (200, 4), np.uint8)
    predicted, loss = chance.randint(0, 3, (6, 200)), chance.rand(6, 200).astype(np.float32)
    diverged = np.array([False] * 5 + [True])

    def answers(lanes):
        return answers_of(labels, lambda where: examples[where], predicted[lanes], loss[lanes], diverged[lanes])

    splits = SimpleNamespace(test=SimpleNamespace(read=lambda where: SimpleNamespace(x=examples[where])))
    monkeypatch.setattr(merge, "open_splits", lambda data: splits)
    parts = [(first, answers([0, 1, 3, 4])), (second, answers([2, 5]))]
    for order in (parts, parts[::-1]):
        found, wanted = merged_answers(arm, order), answers(list(range(6)))
        assert all(
            np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
            for one, other in zip(found, wanted, strict=True)
        )
    other = parts[1][1]._replace(labels=labels + 1)
    with pytest.raises(UserError, match="tested on different examples"):
        merged_answers(arm, [parts[0], (second, Predictions(*other))])


# One machine.


def test_jobs_take_cores_or_gpus(monkeypatch):
    monkeypatch.setattr(jobs, "cores_here", lambda: 8)
    monkeypatch.setattr(jobs, "free_memory", lambda: 64 * 2**30)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    one = replace(EXPERIMENT, devices=None)

    def room(experiment, count, at_a_time=None):
        devices = jobs.devices_per_job(Launch("local"), experiment, count)
        return jobs.slots(devices, at_a_time), devices

    assert room(one, 5) == ([{}] * 8, 1) and room(one, 1) == ([{}], None)
    assert room(one, 5, 3) == ([{}] * 3, 1) and room(one, 5, 20) == ([{}] * 20, 1)
    assert room(replace(one, devices=3), 5) == ([{}] * 2, 3)
    assert room(replace(one, mesh=(2, 2)), 5) == ([{}] * 2, 4)
    with pytest.raises(UserError, match="devices=9: this machine has 8 cores"):
        room(replace(one, devices=9), 5)
    monkeypatch.setattr(jobs, "free_memory", lambda: 5 * 2**30)
    assert room(one, 5) == ([{}] * 2, 1)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(machine, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    assert room(one, 5) == ([{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}], None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert room(one, 5) == ([{}] * 2, 1)


def shell(text):
    return ["sh", "-c", text]


def supervised(commands, place, stop=lambda: False, retries=3, slots=2, said=None):
    """Run commands on this machine; returns what was said, which goes to `said` as well."""
    said = [] if said is None else said
    room = [{"SLOT": str(number)} for number in range(slots)]
    with contextlib.closing(LocalJobs(room, retries, said.append)) as executor:
        supervise(executor, commands, place, stop, said.append)
    return said


def test_a_job_that_is_killed_is_started_again(tmp_path):
    again = f"test -e {tmp_path}/once && exit 0; touch {tmp_path}/once; echo begun; kill -9 $$"
    said = supervised({"a": shell("echo slot $SLOT"), "b": shell(again)}, tmp_path)
    assert sorted(said) == ["a is finished", "b is finished", "b was killed by SIGKILL: started again, 1 of 3 times"]
    assert (tmp_path / "a.log").read_text() in ("slot 0\n", "slot 1\n") and (
        tmp_path / "b.log"
    ).read_text() == "begun\n"


def test_a_job_that_is_killed_time_and_again_ends_the_run(tmp_path):
    said = []
    with pytest.raises(UserError, match="job a was killed by SIGKILL each time"):
        supervised({"a": shell("kill -9 $$")}, tmp_path, retries=2, said=said)
    assert said == [
        f"a was killed by SIGKILL: {again}"
        for again in ("started again, 1 of 2 times", "started again, 2 of 2 times", "given up")
    ]


@pytest.mark.parametrize(("status", "kind"), [(2, UserError), (1, RuntimeError)])
def test_a_mistake_in_a_job_ends_the_others_and_is_one_line(status, kind, tmp_path):
    ready = tmp_path / "ready"
    other = shell(f"trap 'echo saved; exit 143' TERM; touch {ready}; while true; do sleep 0.05; done")
    wrong = shell(f"while ! test -e {ready}; do sleep 0.05; done; echo told; echo error: a mistake; exit {status}")
    said = []
    with pytest.raises(kind, match=rf"^job b: a mistake \(see {tmp_path}/b.log\)$"):
        supervised({"a": other, "b": wrong}, tmp_path, said=said)
    assert (tmp_path / "a.log").read_text() == "saved\n" and said == []


def test_jobs_that_are_asked_to_stop_save_and_no_other_begins(tmp_path):
    waits = f"trap 'echo saved; exit 143' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    with pytest.raises(Stopped, match="stopped: 0 of 2 jobs are finished, what the others have is saved"):
        supervised({"a": shell(waits), "b": shell("exit 0")}, tmp_path, (tmp_path / "ready").exists, slots=1)
    assert (tmp_path / "a.log").read_text() == "saved\n" and not (tmp_path / "b.log").exists()


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_jobs_that_still_run_are_left_alone(more, capsys, tmp_path):
    with RunFolder(tmp_path / "jobs" / "mlp"):
        assert main(["run", "mnist1d", "--executor", "local", "--wandb", "off", "--out", str(tmp_path), *more]) == 2
    assert f"job mlp in {tmp_path} is running: wait for its end" in capsys.readouterr().err
    assert (tmp_path / "jobs" / "mlp").is_dir()


def test_what_has_no_meaning_is_said_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, told in (
        (["mnist1d", "--seeds-per-job", "2"], "--seeds-per-job has no meaning without --executor"),
        (["mnist1d", "--resources", "TPU=4"], "--resources has no meaning without --executor"),
        (["explosion", "--executor", "local"], "explosion trains nothing: --executor has no meaning for it"),
        (["explosion", "--part", "mlp"], "--part is for a job"),
        (["mnist1d", "--part", "mlp", "--executor", "local"], "--part is for a job"),
        (["mnist1d", "--part", "nothing"], "no arm 'nothing'; there are: "),
        (["mnist1d", "--executor", "local", "--seeds-per-job", "0"], "--seeds-per-job must be at least 1, not 0"),
        (["mnist1d", "--executor", "local", "--retries", "-1"], "--retries must be at least 0, not -1"),
        (["mnist1d", "--executor", "local", "--gpus-per-job", "1"], "has no meaning with --executor local"),
        (["mnist1d", "--executor", "local", "--slurm", "time=1"], "--slurm has no meaning with --executor local"),
        (["mnist1d", "--executor", "ray", "--resources", "TPU"], "--resources TPU: expected NAME=N, such as TPU=4"),
        (["mnist1d", "--executor", "ray", "--jobs-at-a-time", "2"], "has no meaning with --executor ray"),
    ):
        assert main(["run", *arguments, "--wandb", "off"]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("error: ") and told in error and error.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(ray_core, "find_spec", lambda name: None)
    assert main(["run", "mnist1d", "--executor", "ray", "--wandb", "off"]) == 2
    assert capsys.readouterr().err == "error: --executor ray needs cnnlib's extra `ray`: pip install -e '.[ray]'\n"
    assert main(["merge", str(tmp_path)]) == 2
    assert "there are no jobs in" in capsys.readouterr().err


# Whole runs.

LONG = 40
RUN = [
    sys.executable,
    "-m",
    "cnnlib",
    "run",
    "mnist1d",
    "arms=logistic,mlp",
    "lanes.seed=0..2",
    "checkpoint.share=1",
]


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"}


def command(out, *arguments):
    return [*RUN, f"epochs={LONG}", "lanes.at_a_time=1", "--out", str(out), *arguments]


def done(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def fingerprints(out):
    arms = json.loads((out / "results.json").read_text())["arms"]
    return {arm["name"]: [lane["parameters_sha256"] for lane in arm["lanes"]] for arm in arms}


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """What a run in one process comes to, with the device that a job has."""
    out = tmp_path_factory.mktemp("long")
    whole = done(*command(out, "devices=1"))
    assert whole.returncode == 0, whole.stderr
    return fingerprints(out)


def has_saved(place):
    """Whether a job has a checkpoint that is whole."""
    return any(path.name.isdecimal() for path in (place / "checkpoints").glob("*/*"))


def pid_of(place):
    return json.loads((place / "run.json").read_text())["sessions"][-1]["pid"]


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_from_its_checkpoint(long, tmp_path):
    jobs_of = command(tmp_path, "--executor", "local", "--seeds-per-job", "2")
    with subprocess.Popen(jobs_of, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        while not has_saved(tmp_path / "jobs" / "mlp-0..1"):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(pid_of(tmp_path / "jobs" / "mlp-0..1"), signal.SIGKILL)
        told, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "mlp-0..1 was killed by SIGKILL: started again, 1 of 3 times" in told
    assert fingerprints(tmp_path) == long and not (tmp_path / "jobs").exists()
    known = json.loads((tmp_path / "run.json").read_text())["jobs"]
    assert {name: len(one["sessions"]) for name, one in known.items()} == {
        "logistic-0..1": 1,
        "logistic-2..2": 1,
        "mlp-0..1": 2,
        "mlp-2..2": 1,
    }
    (resumed,) = known["mlp-0..1"]["resumed"]
    assert resumed["in_flight"]["mlp"] >= 1
    assert json.loads((tmp_path / "results.json").read_text())["resumed"] == []
    assert "finished" in done(sys.executable, "-m", "cnnlib", "runs", str(tmp_path.parent)).stdout


@pytest.mark.slow
def test_jobs_that_are_stopped_go_on_and_those_that_are_finished_are_only_read(long, tmp_path):
    jobs_of = command(tmp_path, "--executor", "local", "--retries", "0", "--jobs-at-a-time", "1")
    with subprocess.Popen(
        jobs_of, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        while not has_saved(tmp_path / "jobs" / "mlp"):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 143
    first, last = told.splitlines()
    assert first == "stopping at the end of this epoch, and saving it; once more stops at once"
    assert last.startswith("stopped: 1 of 2 jobs are finished")
    assert last.endswith("--executor local --jobs-at-a-time 1 --retries 0 --resume")
    finished = (tmp_path / "jobs" / "logistic.log").read_bytes()
    other = done(*command(tmp_path, "--executor", "local", "--seeds-per-job", "2", "--resume"))
    assert other.returncode == 2 and "--seeds-per-job must be what it was" in other.stderr
    alone = done(*command(tmp_path, "--resume"))
    assert alone.returncode == 2 and "has jobs: --resume with --executor" in alone.stderr
    assert (tmp_path / "jobs" / "logistic.log").read_bytes() == finished
    resumed = done(*shlex.split(last.split("go on with: ")[1].replace("cnnlib ", f"{sys.executable} -m cnnlib ", 1)))
    assert resumed.returncode == 0, resumed.stderr
    assert "2 jobs, 1 of them finished before" in resumed.stdout and fingerprints(tmp_path) == long
    again = done(*command(tmp_path, "--executor", "local", "--resume"))
    assert again.returncode == 0 and "there is nothing left to do" in again.stdout
