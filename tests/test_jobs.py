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
from pathlib import Path

import numpy as np
import pytest
from processes import children, is_living

from cnnlib import executors, job, jobs, ray_jobs
from cnnlib.config import Arm, Checkpoint, Data, Experiment, LaneNumbers, Lanes, Optim
from cnnlib.errors import Stopped, UserError
from cnnlib.executors import LocalJobs, Wanted
from cnnlib.fields import to_dict
from cnnlib.folder import RunFolder, arm_of_job
from cnnlib.job import Ending, Process, Task
from cnnlib.jobs import run_jobs
from cnnlib.parts import divided, merged, merged_answers
from cnnlib.predictions import Answers, answers_of, read_answers
from cnnlib.resolve import resolve
from cnnlib.resume import FinishedArm
from cnnlib.run import run
from cnnlib.spec import parse_model
from cnnlib.stopping import Wish
from cnnlib.watcher import Watcher
from experiments.__main__ import main

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


class Listener(Watcher):
    def __init__(self):
        self.said, self.epochs, self.arms, self.began, self.ended = [], [], [], [], []

    def says(self, text):
        self.said.append(text)

    def run_begins(self, beginning):
        self.began.append(beginning)

    def epoch_ends(self, report):
        self.epochs.append((report.arm, report.epoch, len(report.lines), report.diverged))

    def arm_ends(self, name, result, epoch):
        self.arms.append((name, result["test_accuracy"], epoch))

    def run_ends(self, results):
        self.ended.append(results)


class Here:
    """Runs each job in this process, when it is started, but for those whose endings are laid down."""

    def __init__(self, endings=None):
        self.endings, self.started, self.is_stopped, self._done = dict(endings or {}), [], False, []

    def fits(self):
        return not self._done

    def start(self, name, task, place):
        self.started.append(name)
        if self.endings.get(name):
            self._done.append((name, self.endings[name].pop(0)))
            return
        with contextlib.ExitStack() as stack:
            events = os.devnull if place is None else job.beside(place, job.EVENTS)
            file = stack.enter_context(Path(events).open("ab"))
            teller = job.Teller(file.fileno(), task)
            teller.tell("begins", host="here", pid=0)
            try:
                ending = Ending(0, "", json.loads(json.dumps(job.do(task, teller, Wish()))))
            except UserError as error:
                ending = Ending(2, str(error))
        self._done.append((name, ending))

    def ended(self):
        done, self._done = self._done, []
        return done

    def stop(self):
        self.is_stopped = True

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Runs jobs here; called with their endings."""

    def use(endings=None):
        executor = Here(endings)
        monkeypatch.setattr(jobs, "executor_for", lambda *_: (executor, 1))
        return executor

    return use


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(EXPERIMENT, "tiny", out, Watcher())
    return out


def as_jobs(out, watcher=None, experiment=EXPERIMENT, seeds_a_job=None, **options):
    listener = watcher or Listener()
    return run_jobs(experiment, "tiny", out, Wanted("local", seeds_a_job), listener, lambda _: Watcher(), **options)


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
    files = sorted(path.name for path in out.iterdir() if path.name not in ("table.md", "accuracy.png"))
    return results, [{key: value for key, value in line.items() if key != "seconds"} for line in lines], answers, files


def names_of(arms, seeds_a_job):
    return [(one.name, one.part.seeds, len(one.arm.lanes)) for one in divided(arms, seeds_a_job)]


def test_jobs_are_arms_or_blocks_of_their_seeds():
    arms = resolve(EXPERIMENT)
    assert names_of(arms, None) == names_of(arms, 3) == [("conv", None, 6), ("own-fields", None, 6)]
    assert names_of(arms, 2) == [
        ("conv-3..1", (3, 1), 4),
        ("conv-4..4", (4,), 2),
        ("own-fields-9..5", (9, 5), 4),
        ("own-fields-7..7", (7,), 2),
    ]
    assert len(names_of(arms, 1)) == 6
    assert arm_of_job("own-fields-9..9") == arm_of_job("own-fields") == "own-fields"
    ordered = replace(EXPERIMENT, lanes=Lanes(seed=(1, 2), order_seed=(7, 8, 9)))
    assert names_of(resolve(ordered), 1)[0] == ("conv-1..1", (1,), 6)


@pytest.mark.slow
def test_blocks_of_seeds_are_put_together_to_what_one_process_comes_to(here, whole, tmp_path):
    executor, listener, copy = here(), Listener(), Listener()
    results = as_jobs(tmp_path / "run", listener, seeds_a_job=2, copy=copy)
    names = [one.name for one in divided(resolve(EXPERIMENT), 2)]
    assert executor.started == ["identify", *names, "finish"] and len(names) == 4
    assert comparable(tmp_path / "run") == comparable(whole)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text()) and results["resumed"] == []
    assert (tmp_path / "run" / "table.md").exists() and (tmp_path / "run" / "accuracy.png").exists()
    # A copy is told what it would have been told, arm by arm.
    assert copy.epochs == [("conv", 1, 6, 0), ("conv", 2, 6, 0), ("own-fields", 1, 6, 0)]
    assert copy.arms == [(arm["name"], arm["test_accuracy"], 0) for arm in results["arms"]]
    assert len(copy.began[0].lanes["conv"]) == 6 and copy.ended == [results]
    # And it is a run like others.
    assert as_jobs(tmp_path / "run", resume=True) == results and executor.started[-1] == "identify"
    assert run(EXPERIMENT, "tiny", tmp_path / "run", Watcher(), resume=True) == results


DIED = Ending(-signal.SIGKILL, "killed by SIGKILL")


@pytest.mark.slow
def test_a_job_that_dies_goes_on(here, whole, tmp_path):
    executor, listener = here({"own-fields": [DIED, DIED]}), Listener()
    as_jobs(tmp_path, listener)
    assert executor.started == ["identify", "conv", *["own-fields"] * 3, "finish"]
    assert "own-fields was killed by SIGKILL: again, 2 of at most 3 times" in listener.said
    assert comparable(tmp_path) == comparable(whole)


def test_a_job_that_dies_time_and_again_ends_the_run(here, tmp_path):
    executor = here({"conv": [DIED] * 4})
    with pytest.raises(UserError, match="conv was killed by SIGKILL, and is not tried again"):
        as_jobs(tmp_path)
    assert executor.started == ["identify", *["conv"] * 4] and executor.is_stopped


@pytest.mark.slow
def test_a_mistake_ends_the_run_and_what_is_finished_is_not_run_again(here, whole, tmp_path):
    executor = here({"conv-4..4": [Ending(1, "unexpected KeyError: 'a'")]})
    with pytest.raises(RuntimeError, match=r"conv-4..4: unexpected KeyError"):
        as_jobs(tmp_path, seeds_a_job=2)
    assert executor.started == ["identify", "conv-3..1", "conv-4..4"] and executor.is_stopped
    executor = here({"own-fields-7..7": [Ending(2, "no room")]})
    with pytest.raises(UserError, match=r"^no room$"):
        as_jobs(tmp_path, seeds_a_job=2, resume=True)
    assert executor.started == ["identify", "conv-4..4", "own-fields-9..5", "own-fields-7..7"]
    before = json.loads((tmp_path / "run.json").read_text())
    assert [one["state"] for one in before["sessions"]] == ["failed", "failed"]
    here()
    with pytest.raises(UserError, match=r"own-fields-9..5 is a job .* --seeds-a-job must be what it was"):
        as_jobs(tmp_path, seeds_a_job=1, resume=True)
    assert json.loads((tmp_path / "run.json").read_text()) == before
    executor, listener = here(), Listener()
    as_jobs(tmp_path, listener, seeds_a_job=2, resume=True)
    assert executor.started == ["identify", "own-fields-7..7", "finish"]
    assert {"finished before: conv", "own-fields-9..5: finished before"} <= set(listener.said)
    found, *rest = comparable(tmp_path)
    wanted, *others = comparable(whole)
    assert [entry["finished"] for entry in found.pop("resumed")] == [[], ["conv"]] and wanted.pop("resumed") == []
    assert (found, *rest) == (wanted, *others)
    known = json.loads((tmp_path / "run.json").read_text())["jobs"]
    assert len(known) == 4 and all(len(one["sessions"]) == 1 and not one["resumed"] for one in known.values())


@pytest.mark.once
def test_a_wish_to_stop_is_passed_on_and_kept(here, tmp_path):
    executor = here()
    with pytest.raises(Stopped, match="1 of 2 arms are finished, what the other jobs have is saved"):
        as_jobs(tmp_path, stop=lambda: "conv" in executor.started)
    assert executor.started == ["identify", "conv"] and executor.is_stopped
    assert json.loads((tmp_path / "run.json").read_text())["sessions"][-1]["state"] == "interrupted"
    with RunFolder(tmp_path):  # which is free
        pass


@pytest.mark.slow
def test_what_one_process_has_begun_jobs_do_not_train_again_nor_the_other_way_round(here, tmp_path):
    executor = here({"own-fields": [Ending(2, "no room")]})
    with pytest.raises(UserError, match="no room"):
        as_jobs(tmp_path / "jobs")
    assert executor.started == ["identify", "conv", "own-fields"]
    (tmp_path / "jobs" / "jobs" / "own-fields").mkdir()
    with pytest.raises(UserError, match=r"own-fields is a job of own-fields: --resume with --executor, as before,"):
        run(replace(EXPERIMENT, devices=1), "tiny", tmp_path / "jobs", Watcher(), resume=True)

    listener = Listener()
    begun = replace(EXPERIMENT, checkpoint=Checkpoint(share=1.0))
    with pytest.raises(Stopped):
        run(begun, "tiny", tmp_path / "run", listener, stop=lambda: bool(listener.epochs))
    with pytest.raises(UserError, match=r"has checkpoints of conv by one process: --resume without --executor goes on"):
        as_jobs(tmp_path / "run", experiment=begun, resume=True)
    assert executor.started[3:] == ["identify"]


def test_a_second_run_moves_the_jobs_of_an_earlier_one_aside(here, tmp_path):
    here({"conv": [Ending(2, "no room")]})
    with pytest.raises(UserError, match="no room"):
        as_jobs(tmp_path)
    (tmp_path / "jobs" / "left-over").mkdir()
    executor, listener = here({"conv": [Ending(2, "no room")]}), Listener()
    with pytest.raises(UserError, match="no room"):
        as_jobs(tmp_path, listener)
    assert executor.started[:2] == ["identify", "conv"] and "moved to" in listener.said[0]
    assert [path.name for path in (tmp_path / "earlier").glob("*/jobs/*")].count("left-over") == 1
    assert not (tmp_path / "jobs" / "left-over").exists()


@pytest.mark.once
def test_a_job_that_would_not_compute_what_the_run_began_with_is_refused(here, tmp_path, monkeypatch):
    executor, alone = here(), jobs.alone

    def changed(*arguments):
        known = alone(*arguments)
        known["parts"]["conv"]["versions"]["jax"] = "0.0.1"
        return known

    monkeypatch.setattr(jobs, "alone", changed)
    with pytest.raises(UserError, match=r"on \S+ a job would not compute what the run began with: jax was 0.0.1, is"):
        as_jobs(tmp_path)
    assert executor.started == ["identify", "conv"]


# Putting together.


def lane(seed, rate, accuracy, status="ok"):
    numbers = LaneNumbers(seed, seed, rate, 0.9, 0.0, 0.0, 0.0, 0.0)._asdict()
    fine = status == "ok"
    known = {"test_accuracy": accuracy if fine else None, "train_accuracy": 1.0 if fine else None, "status": status}
    return {**numbers, **known, "validation_accuracy": accuracy if fine else None, "parameters_sha256": str(seed)}


def part_of(lanes, seconds, **change):
    result = {
        "name": "full",
        "model": "dense:3",
        "compile_seconds": seconds,
        "lanes_at_a_time": len(lanes),
        "devices": 1,
        "mesh": [1, 1],
        "memory_bytes": int(seconds),
        "train_seconds_per_lane": seconds,
        "test_accuracy": "its own",
        "chosen_setting": 7,
        "settings": "its own",
        "lanes": lanes,
        **change,
    }
    lines = [
        {"epoch": epoch, "lane": number, "seed": one["seed"]} for epoch in (1, 2) for number, one in enumerate(lanes)
    ]
    return FinishedArm(result, lines, 1.0)


def two_parts():
    """Of seeds 3, 1 and 4 with two settings, the last lane diverged."""
    experiment = replace(EXPERIMENT, lanes=Lanes(seed=(3, 1, 4)), arms=EXPERIMENT.arms[:1])
    (arm,) = resolve(experiment)
    first = part_of([lane(3, 0.01, 0.5), lane(1, 0.01, 0.75), lane(3, 0.03, 1.0), lane(1, 0.03, 0.5)], 2.0)
    second = part_of([lane(4, 0.01, 0.25), lane(4, 0.03, 0.0, "diverged")], 5.0)
    return arm, first, second


def test_lanes_of_parts_go_where_the_whole_experiment_has_them():
    arm, first, second = two_parts()
    for parts in ([first, second], [second, first]):
        found = merged(arm, parts, 42.0)
        result = found.result
        assert [one["seed"] for one in result["lanes"]] == [3, 1, 4, 3, 1, 4] and found.wall_seconds == 42.0
        assert [one["learning_rate"] for one in result["lanes"]] == [0.01] * 3 + [0.03] * 3
        assert [setting["test_accuracy"]["n"] for setting in result["settings"]] == [3, 2]
        assert [setting["diverged"] for setting in result["settings"]] == [0, 1]
        assert result["chosen_setting"] == 0 and result["test_accuracy"]["mean"] == 0.5
        assert result["train_seconds_per_lane"] == pytest.approx((4 * 2.0 + 2 * 5.0) / 6)
        assert (result["compile_seconds"], result["lanes_at_a_time"], result["memory_bytes"]) == (7.0, 4, 5)
        assert [(line["epoch"], line["lane"]) for line in found.lines] == [(e, n) for e in (1, 2) for n in range(6)]
        assert [line["seed"] for line in found.lines] == [3, 1, 4, 3, 1, 4] * 2
    assert set(result) == set(first.result)


def test_parts_that_are_not_those_of_the_arm_are_refused():
    arm, first, second = two_parts()
    for parts in ([first], [first, first], [first, part_of([lane(9, 0.01, 0.5), lane(4, 0.03, 0.5)], 1.0)]):
        with pytest.raises(UserError, match="other lanes than it has"):
            merged(arm, parts, 1.0)
    with pytest.raises(UserError, match="disagree about model"):
        merged(arm, [first, part_of(second.result["lanes"], 5.0, model="dense:4")], 1.0)


def test_answers_of_parts_are_those_of_all_lanes_with_the_worst_of_all():
    arm, first, second = two_parts()
    chance = np.random.RandomState(0)
    labels, examples = chance.randint(0, 3, 200), chance.randint(0, 255, (200, 4), np.uint8)
    predicted, loss = chance.randint(0, 3, (6, 200)), chance.rand(6, 200).astype(np.float32)
    diverged = np.array([False] * 5 + [True])

    def answers(lanes):
        return answers_of(labels, lambda where: examples[where], predicted[lanes], loss[lanes], diverged[lanes])

    parts = [(first, answers([0, 1, 3, 4])), (second, answers([2, 5]))]
    asked = []

    def examples_at(where):
        asked.extend(where.tolist())
        return examples[where]

    for order in (parts, parts[::-1]):
        found, wanted = merged_answers(arm, order, examples_at), answers(list(range(6)))
        assert all(
            np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
            for one, other in zip(found, wanted, strict=True)
        )
    kept = {int(index) for _, one in parts for index in one.worst}
    assert asked and not kept & set(asked)
    other = parts[1][1]._replace(labels=labels + 1)
    with pytest.raises(UserError, match="tested on different examples"):
        merged_answers(arm, [parts[0], (second, Answers(*other))], examples_at)


# One machine.


class Fake:
    def __init__(self, peak_bytes):
        self.peak_bytes = peak_bytes


def test_another_job_is_started_where_it_and_the_growth_of_the_others_fit(monkeypatch):
    free = {"bytes": 0}
    monkeypatch.setattr(executors, "free_memory", lambda: free["bytes"])
    local = LocalJobs([{}] * 3)
    assert local.fits()  # one always does
    gib = 2**30
    local._running = {"a": (Fake(gib // 2), {}), "b": (Fake(3 * gib), {})}
    local._free.pop()
    # b is the largest: a may grow by 2.5 GiB, and the new one needs 3.
    for bytes_free, fits in ((5.4 * gib / 0.9, False), (5.6 * gib / 0.9, True)):
        free["bytes"] = bytes_free
        assert local.fits() == fits
    local._free.clear()
    assert not local.fits()


def test_jobs_take_cores_or_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(executors, "cores_here", lambda: 8)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    one = replace(EXPERIMENT, devices=None)

    def slots(experiment, count):
        local, devices = executors.executor_for(Wanted("local"), experiment, count, tmp_path)
        return local._free, devices

    assert slots(one, 5) == ([{}] * 8, 1) and slots(one, 1) == ([{}], None)
    assert slots(replace(one, devices=3), 5) == ([{}] * 2, 3)
    assert slots(replace(one, mesh=(2, 2)), 5) == ([{}] * 2, 4)
    with pytest.raises(UserError, match="devices=9: this machine has 8 cores"):
        slots(replace(one, devices=9), 5)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(executors, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    assert slots(one, 5) == ([{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}], 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots(one, 5) == ([{}] * 8, 1)


def task_of(**change):
    known = {"does": "train", "name": "tiny", "experiment": to_dict(EXPERIMENT), "folder": "/nowhere", "cores": 1}
    return Task(**{**known, **change})


def ended(process, seconds=300):
    until = time.monotonic() + seconds
    while (ending := process.ending()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return ending


def test_a_mistake_in_a_job_is_one_line_and_its_files_say_the_rest(tmp_path):
    wrong = task_of(folder=str(tmp_path / "a-1..2"), arm="own-fields", seeds=[1, 9])
    ending = ended(Process(wrong._asdict(), tmp_path / "a-1..2"))
    assert ending == Ending(2, "arm own-fields has no lanes of seed 1") and not ending.is_death
    first, last = job.parsed((tmp_path / "a-1..2.events").read_bytes())
    assert first["event"] == "begins" and last == {"event": "ended", "status": 2, "text": ending.text, "value": None}
    crash = ended(Process({"does": "train"}, tmp_path / "b"))
    assert crash.status == 1 and "without a word: TypeError" in crash.text and not crash.is_death


HUNGRY = """
import json, subprocess, sys, time
sys.stdin.readline()
room = "room = bytearray(300 << 20); print(flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", room], stdout=subprocess.PIPE)
child.stdout.readline()
time.sleep(3)
child.kill()
"""


def test_memory_of_a_job_is_that_of_its_children_too(tmp_path, monkeypatch):
    (tmp_path / "hungry").write_text(HUNGRY)
    popen = subprocess.Popen
    monkeypatch.setattr(job.subprocess, "Popen", lambda _, **how: popen([sys.executable, tmp_path / "hungry"], **how))
    process = Process({}, None)
    monkeypatch.undo()
    ended(process)
    assert 300 * 2**20 < process.peak_bytes < 400 * 2**20


def test_a_job_ends_when_their_owner_is_killed(tmp_path):
    long = replace(EXPERIMENT, epochs=10**6, checkpoint=Checkpoint())
    told = task_of(experiment=to_dict(long), folder=str(tmp_path / "a"), arm="conv")._asdict()
    script = f"""
import time
from pathlib import Path
from cnnlib.job import Process
process = Process({told!r}, Path({str(tmp_path / "a")!r}))
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as owner:
        try:
            until = time.monotonic() + 60
            while not (pids := children(owner.pid)):
                assert time.monotonic() < until and owner.poll() is None
                time.sleep(0.05)
            time.sleep(0.5)
        finally:
            owner.kill()
        until = time.monotonic() + 60
        while any(map(is_living, pids)):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_what_has_no_meaning_is_said_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_jobs, "find_spec", lambda name: name)
    for arguments, told in (
        (["mnist1d", "--seeds-a-job", "2"], "--seeds-a-job has no meaning without --executor"),
        (["mnist1d", "--resources", "TPU=4"], "--resources has no meaning without --executor"),
        (["explosion", "--executor", "local"], "explosion trains nothing: --executor has no meaning for it"),
        (["explosion", "--retries", "1"], "explosion trains nothing: --retries has no meaning for it"),
        (["mnist1d", "--executor", "local", "--seeds-a-job", "0"], "--seeds-a-job must be at least 1, not 0"),
        (["mnist1d", "--executor", "local", "--retries", "-1"], "--retries must not be negative, not -1"),
        (["mnist1d", "--executor", "local", "--gpus-a-job", "1"], "have no meaning with --executor local"),
        (["mnist1d", "--executor", "ray", "--resources", "TPU"], "--resources TPU: expected NAME=N, such as TPU=4"),
        (["mnist1d", "--executor", "ray", "--ray-address", "nowhere"], "nowhere is no address of a cluster's head"),
        (["mnist1d", "--executor", "ray", "--ray-address", "127.0.0.1:1"], "no cluster at 127.0.0.1:1: "),
    ):
        assert main(["run", *arguments]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("error: ") and told in error and error.count("\n") == 1 and out == ""
    monkeypatch.setattr(ray_jobs, "find_spec", lambda name: None)
    assert main(["run", "mnist1d", "--executor", "ray"]) == 2
    assert capsys.readouterr().err == "error: --executor ray needs cnnlib's extra `ray`: pip install -e '.[ray]'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_sees_another_folder_is_told_so(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "token").write_text("other")
    files = [str(tmp_path / "jobs" / name) for name in ("a", "token", "stop")]
    for token_file in (files[1], str(tmp_path / "nowhere")):
        status, text, _ = ray_jobs.attended({}, files[0], {}, token_file, "mine", files[2])
        assert status == 2 and text.endswith(
            f"does not see {tmp_path} as this machine does: all nodes must share its file system"
        )
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["token"]


# In processes of their own, by really doing it.

FIELDS = ["arms=logistic,mlp", "lanes.seed=0..2", "lanes.at_a_time=1", "checkpoint.share=1"]


def command(out, *arguments, epochs=4):
    start = [sys.executable, "-m", "experiments", "run", "mnist1d", *FIELDS, f"epochs={epochs}"]
    return [*start, "--out", str(out), *arguments]


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"}


def done(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def fingerprints(out):
    arms = json.loads((out / "results.json").read_text())["arms"]
    return {arm["name"]: [lane["parameters_sha256"] for lane in arm["lanes"]] for arm in arms}


LONG = 40


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """What a run in one process comes to, with the device that a job has."""
    out = tmp_path_factory.mktemp("long")
    whole = done(*command(out, "devices=1", epochs=LONG))
    assert whole.returncode == 0, whole.stderr
    return fingerprints(out)


@contextlib.contextmanager
def started(out, *arguments):
    """A run as jobs of which one has told an epoch; killed in the end, if it lives."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command(out, "--executor", "local", *arguments, epochs=LONG), **pipes, env=environment()
    ) as process:
        assert process.stdout is not None
        try:
            while f"epoch 1/{LONG}" not in process.stdout.readline():
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def job_processes(out):
    """The processes of jobs of a run, by the files that they have open."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"cnnlib.job" in (place / "cmdline").read_bytes():
                for one in (place / "fd").iterdir():
                    with contextlib.suppress(OSError):  # closed by now
                        if str(out) in str(one.readlink()):
                            found.append(int(place.name))
                            break
    return found


@pytest.mark.slow
def test_a_run_as_jobs_has_the_fingerprints_of_one_in_one_process(long, tmp_path):
    ended = done(*command(tmp_path / "run", "--executor", "local", "--seeds-a-job", "2", epochs=LONG))
    assert ended.returncode == 0, ended.stderr
    assert fingerprints(tmp_path / "run") == long
    assert ended.stdout.count(f"epoch {LONG}/{LONG}  ") == 2 * len(long), ended.stdout  # 3 seeds: two jobs per arm
    assert not (tmp_path / "run" / "jobs").exists() and not job_processes(tmp_path)
    report = done(sys.executable, "-m", "experiments", "report", str(tmp_path / "run"), "--out", str(tmp_path / "page"))
    assert report.returncode == 0 and "logistic" in (tmp_path / "page").read_text()
    assert "finished" in done(sys.executable, "-m", "experiments", "runs", str(tmp_path)).stdout


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_from_its_checkpoint(long, tmp_path):
    with started(tmp_path) as process:
        kept = tmp_path / "jobs" / "mlp" / "checkpoints" / "mlp"
        while not any(path.name.isdecimal() for path in kept.glob("*")):
            assert process.poll() is None
            time.sleep(0.01)
        (victim,) = job_processes(tmp_path / "jobs" / "mlp")
        os.kill(victim, signal.SIGKILL)
        told, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "mlp was killed by SIGKILL: again, 1 of at most 3 times" in told and "mlp goes on after epoch" in told
    assert fingerprints(tmp_path) == long
    known = json.loads((tmp_path / "run.json").read_text())["jobs"]
    assert {name: len(one["sessions"]) for name, one in known.items()} == {"logistic": 1, "mlp": 2}
    (resumed,) = known["mlp"]["resumed"]
    assert resumed["in_flight"]["mlp"] >= 1 and known["logistic"]["resumed"] == []
    assert json.loads((tmp_path / "results.json").read_text())["resumed"] == []


@pytest.mark.slow
def test_a_driver_that_is_killed_takes_its_jobs_along_and_is_resumed(long, tmp_path):
    with started(tmp_path) as process:
        assert job_processes(tmp_path)
        process.kill()
        process.wait()
        until = time.monotonic() + 30
        while job_processes(tmp_path):
            assert time.monotonic() < until
            time.sleep(0.01)
    resumed = done(*command(tmp_path, "--executor", "local", "--resume", epochs=LONG))
    assert resumed.returncode == 0, resumed.stderr
    assert fingerprints(tmp_path) == long
    log = (tmp_path / "log.txt").read_text()
    known = json.loads((tmp_path / "run.json").read_text())["jobs"]
    assert len(known) == 2 and all(log.count(f"{name}: epoch {LONG}/{LONG}") <= 1 for name in known)
    assert all([one["state"] for one in each["sessions"]].count("finished") == 1 for each in known.values())


@pytest.mark.slow
def test_a_driver_that_is_asked_to_stop_lets_its_jobs_save_and_says_how_to_go_on(long, tmp_path):
    with started(tmp_path, "--seeds-a-job", "3", "--retries", "0") as process:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 143 and not job_processes(tmp_path)
    first, last = told.splitlines()
    assert first == "stopping at the end of this epoch, and saving it; once more stops at once"
    assert last.startswith("stopped: 0 of 2 arms are finished")
    assert last.endswith("--executor local --seeds-a-job 3 --retries 0 --resume")
    states = [json.loads(path.read_text())["sessions"][-1] for path in (tmp_path / "jobs").glob("*/run.json")]
    assert states and all(one["state"] in ("interrupted", "finished") for one in states), states
    resumed = done(*shlex.split(last.split("go on with: ")[1].replace("python ", f"{sys.executable} ", 1)))
    assert resumed.returncode == 0, resumed.stderr
    assert fingerprints(tmp_path) == long
