"""A run that was interrupted, however, ends with what an uninterrupted one ends with."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cnnlib import resume
from cnnlib.config import Arm, Checkpoint, Data, Experiment, Lanes, Optim
from cnnlib.errors import Stopped, UserError
from cnnlib.multihost import Hosts
from cnnlib.run import run
from cnnlib.spec import parse_model
from cnnlib.watcher import Watcher

EXPERIMENT = Experiment(
    arms=(
        Arm("full", parse_model("avg:4 dense:8 relu dense:classes")),
        Arm("conv", parse_model("avg:4 conv:4@3 relu dense:classes")),
    ),
    data=Data("lines", validation=200),
    optim=Optim("adam", learning_rate=(0.01, 0.03)),
    lanes=Lanes(seed=(3, 4)),
    epochs=3,
    batch_size=200,
    checkpoint=Checkpoint(share=1.0),
)


class Listener(Watcher):
    def __init__(self):
        self.said, self.epochs = [], []

    def says(self, text):
        self.said.append(text)

    def epoch_ends(self, report):
        self.epochs.append((report.arm, report.epoch))


def comparable(out):
    """All that a run has left behind, but for times and for how often it was resumed."""
    results = json.loads((out / "results.json").read_text())
    for name in ("wall_seconds", "resumed", "commit", "finished"):  # whoever develops may edit while tests run
        results.pop(name)
    for arm in results["arms"]:
        for name in ("compile_seconds", "train_seconds_per_lane", "memory_bytes"):
            arm.pop(name)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return results, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def stop_after(epochs):
    """A wish to stop that is made once so many epochs have been told."""
    told = Listener()
    return told, lambda: len(told.epochs) >= epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(EXPERIMENT, "tiny", out, Listener())
    return out


def interrupted(out, epochs, experiment=EXPERIMENT):
    watcher, stop = stop_after(epochs)
    with pytest.raises(Stopped) as stopped:
        run(experiment, "tiny", out, watcher, stop=stop)
    return watcher, str(stopped.value)


SECRET = "-".join(("s3cr3t", "value"))  # not as it is in git.diff, while this line is edited


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Runs that were stopped after epoch 1 and after epoch 2 of the first arm, among secrets."""
    outs = {epoch: tmp_path_factory.mktemp("stopped") for epoch in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "MY_TOKEN", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, SECRET)
        for epoch, out in outs.items():
            interrupted(out, epoch)
    return outs


def copy_of(out, place):
    """Copy a run, so that a test may change it."""
    shutil.copytree(out, place)
    return place


@pytest.mark.slow
def test_a_run_that_was_stopped_twice_ends_as_one_that_was_not(whole, tmp_path):
    watcher, told = interrupted(tmp_path, 1)
    assert told == "stopped after epoch 1 of 3 of full, which is saved" and watcher.epochs == [("full", 1)]
    watcher, stop = stop_after(4)
    with pytest.raises(Stopped, match=r"after epoch [23] of 3 of conv"):
        run(EXPERIMENT, "tiny", tmp_path, watcher, resume=True, stop=stop)
    assert watcher.epochs[:3] == [("full", 2), ("full", 3), ("conv", 1)]
    watcher = Listener()
    results = run(EXPERIMENT, "tiny", tmp_path, watcher, resume=True)
    assert "finished before: full" in watcher.said
    assert comparable(tmp_path) == comparable(whole)
    assert [len(entry["finished"]) for entry in results["resumed"]] == [0, 1]
    assert results["resumed"][0]["in_flight"] == {"full": 1} and results["resumed"][0]["changes"] == []


@pytest.mark.once
def test_a_finished_run_is_left_alone(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    watcher = Listener()
    results = run(EXPERIMENT, "tiny", whole, watcher, resume=True)
    assert watcher.said[-1].endswith("is finished: there is nothing left to do") and watcher.epochs == []
    assert results == json.loads((whole / "results.json").read_text())
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_results_that_were_lost_are_put_together_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{")
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "run", watcher, resume=True)
    assert "finished before: full, conv" in watcher.said
    assert watcher.epochs == [] and comparable(tmp_path / "run") == comparable(whole)


@pytest.mark.slow
def test_where_there_is_no_run_one_begins_and_says_so(whole, tmp_path):
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "new", watcher, resume=True)
    assert watcher.said[0].endswith("to resume: a new one begins") and comparable(tmp_path / "new") == comparable(whole)


def checkpoints(out, arm="full"):
    return sorted((out / "checkpoints" / arm).iterdir(), key=lambda path: int(path.name))


SLOW = [pytest.param(damage, marks=pytest.mark.slow) for damage in ("truncated", "lost", "progress")]


@pytest.mark.once
@pytest.mark.parametrize("damage", ["flipped", *SLOW])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(damage, whole, stopped, tmp_path):
    out = copy_of(stopped[2], tmp_path / "run")
    last = checkpoints(out)[-1]
    numbers = max(
        (path for path in (last / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(numbers.read_bytes())
    if damage == "truncated":
        numbers.write_bytes(content[:100])
    elif damage == "flipped":
        content[200] ^= 1
        numbers.write_bytes(content)
    elif damage == "lost":
        numbers.unlink()
    else:
        (last / "progress" / "metadata").write_text("{")
    watcher = Listener()
    run(EXPERIMENT, "tiny", out, watcher, resume=True)
    (told,) = (text for text in watcher.said if "cannot be read" in text)
    assert told.startswith(f"the checkpoint of full after epoch {last.name} cannot be read")
    assert watcher.epochs[0] == ("full", int(last.name)) and len(list((out / "unreadable").iterdir())) == 1
    assert comparable(out) == comparable(whole)


@pytest.mark.slow
def test_without_a_checkpoint_that_can_be_read_the_arm_starts_anew(whole, stopped, tmp_path):
    out = copy_of(stopped[2], tmp_path / "run")
    for checkpoint in checkpoints(out):
        shutil.rmtree(checkpoint / "progress")
    watcher = Listener()
    run(EXPERIMENT, "tiny", out, watcher, resume=True)
    assert "full has no checkpoint to go on from: it starts anew" in watcher.said
    assert comparable(out) == comparable(whole)


@pytest.mark.once
def test_an_arm_whose_last_checkpoint_is_all_there_is_is_tested_and_kept(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "arms")
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "run", watcher, resume=True)
    assert watcher.epochs == [] and comparable(tmp_path / "run") == comparable(whole)
    assert {path.name for path in (tmp_path / "run" / "arms").iterdir()} == {"full.json", "conv.json"}


@pytest.mark.slow
def test_arms_of_other_seeds_are_no_results_of_this_configuration(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    other = replace(EXPERIMENT, lanes=Lanes(seed=(7, 8)))
    with pytest.raises(UserError, match=r"lanes.seed was 3,4, is 7,8"):
        run(other, "tiny", tmp_path / "run", Listener(), resume=True)
    results = run(other, "tiny", tmp_path / "run", Listener(), resume=True, force=True)
    assert [[lane["seed"] for lane in arm["lanes"]] for arm in results["arms"]] == [[7, 8, 7, 8]] * 2


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_gone_on_from(whole, stopped, tmp_path):
    out = copy_of(stopped[1], tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(whole / "checkpoints", out / "checkpoints")
    watcher = Listener()
    run(EXPERIMENT, "tiny", out, watcher, resume=True)
    assert any("its run is not that of this run" in text for text in watcher.said)
    assert watcher.epochs[0] == ("full", 1) and comparable(out) == comparable(whole)


@pytest.mark.slow
def test_what_has_changed_is_said_and_refused_unless_forced(stopped, tmp_path):
    out = copy_of(stopped[1], tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = replace(EXPERIMENT, batch_size=100)
    with pytest.raises(UserError, match=r"cannot be resumed to the same numbers: batch_size was 200, is 100; --force"):
        run(changed, "tiny", out, Listener(), resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    watcher = Listener()
    results = run(changed, "tiny", out, watcher, resume=True, force=True)
    assert "since the run began: batch_size was 200, is 100" in watcher.said and watcher.epochs[0] == ("full", 2)
    (entry,) = results["resumed"]
    assert entry["changes"] == ["batch_size was 200, is 100"] and entry["forced"]


def test_other_code_libraries_data_and_devices_are_refused_and_another_processor_is_said():
    before = {
        "experiment": "tiny",
        "config": {"epochs": 3, "lanes.at_a_time": None, "checkpoint.every": 1, "data.data_dir": None},
        "code_sha256": "a" * 64,
        "data_sha256": "b" * 64,
        "versions": {"jax": "0.10.2", "python": "3.11.7"},
        "device": {"platform": "cpu", "kind": "cpu", "kernels": "native"},
        "machine": {"processor": "one", "cores": 2},
    }
    assert resume.differences(before, before) == ([], [])

    def found(**change):
        return resume.differences(before, {**before, **change})

    for change in (
        {"experiment": "other"},
        {"code_sha256": "c" * 64},
        {"data_sha256": "c" * 64},
        {"versions": {"jax": "0.12.0", "python": "3.11.7"}},
        {"device": {"platform": "gpu", "kind": "cpu", "kernels": "native"}},
        {"device": {"platform": "cpu", "kind": "cpu", "kernels": "xla"}},
        {"settings": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}},
        {"config": {**before["config"], "epochs": 4}},
    ):
        assert len(found(**change).refused) == 1 and not found(**change).told
    for change in (
        {"machine": {"processor": "two", "cores": 2}},
        {"versions": {"jax": "0.10.2", "python": "3.11.8"}},
        {"config": {**before["config"], "lanes.at_a_time": 2}},
    ):
        assert not found(**change).refused and len(found(**change).told) == 1
    assert found(config={**before["config"], "checkpoint.every": 2, "data.data_dir": "/data"}) == ([], [])


def test_fields_that_an_arm_has_of_its_own_are_told_apart_as_those_of_all():
    def found(*own):
        sides = [{"config": {"arms.full.own": [*texts]}} for texts in (("epochs=3",), own)]
        return resume.differences(*sides)

    assert found("epochs=4") == (["arms.full.epochs was 3, is 4"], [])
    assert found() == (["arms.full.epochs was 3, is None"], [])
    assert found("epochs=3", "accumulate=2") == ([], ["arms.full.accumulate was None, is 2"])
    assert found("epochs=3", "data.workers=2", "checkpoint.keep=3") == ([], [])


def test_of_data_that_are_streamed_only_on_one_side_no_sums_are_compared():
    sides = [{"data_sha256": name, "settings": {"streamed": streamed}} for name, streamed in (("a", []), ("b", ["x"]))]
    assert resume.differences(*sides).refused == ["streamed was nothing, is x"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"accumulate": 2}, "accumulate was 1, is 2"),
        ({"checkpoint.every": 2}, "checkpoint.every was 1, is 2"),
        ({"arms.full.own": ["mesh=1,2"]}, "arms.full.mesh was None, is 1,2"),
        ({"data.data_dir": "/data", "data.workers": 4, "wandb.per": "arm"}, None),
    ],
)
def test_hosts_train_together_only_where_what_they_do_is_one_thing(change, told):
    config = {"accumulate": 1, "checkpoint.every": 1, "arms.full.own": [], "data.data_dir": None, "data.workers": 0}

    class Other(Hosts):
        def from_first(self, value):
            return json.dumps({"config": config}).encode()

        def same(self, what, value):
            assert value == ("none" if told is None else told)

    resume.check_alike(Other(), {"config": {**config, **change}})


@pytest.mark.slow
def test_resumed_with_more_lanes_at_a_time_the_numbers_agree_to_rounding(whole, tmp_path):
    one = replace(EXPERIMENT, lanes=Lanes(seed=(3, 4), at_a_time=1))
    interrupted(tmp_path / "one", 1, one)
    out = copy_of(tmp_path / "one", tmp_path / "four")
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "one", watcher, resume=True)  # goes on as it was
    assert not any("lanes at a time" in text for text in watcher.said)
    four = replace(EXPERIMENT, lanes=Lanes(seed=(3, 4), at_a_time=4))
    watcher = Listener()
    run(four, "tiny", out, watcher, resume=True)
    assert any("4 lanes at a time, 1 before: the results agree to rounding" in text for text in watcher.said)
    for ours, theirs in zip(comparable(out)[1], comparable(whole)[1], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_lane_that_diverges_harms_no_other_and_stays_gone_after_a_resume(tmp_path):
    deep = (Arm("deep", parse_model("avg:4 conv:4@3 dense:8 dense:classes")),)
    sane = replace(EXPERIMENT, arms=deep, optim=Optim("sgd", learning_rate=(0.01,)))
    both = replace(sane, optim=Optim("sgd", learning_rate=(0.01, 1e8)))
    alone = run(sane, "tiny", tmp_path / "alone", Listener())["arms"][0]["lanes"]
    run(both, "tiny", tmp_path / "whole", Listener())
    interrupted(tmp_path / "resumed", 2, both)
    (arm,) = run(both, "tiny", tmp_path / "resumed", Listener(), resume=True)["arms"]
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    assert [lane["status"] for lane in arm["lanes"]] == ["ok", "ok", "diverged", "diverged"]
    assert [lane["parameters_sha256"] for lane in arm["lanes"][:2]] == [lane["parameters_sha256"] for lane in alone]
    assert [setting["test_accuracy"]["n"] for setting in arm["settings"]] == [2, 0]


def test_nothing_is_read_or_written_through_a_link_that_leads_out(stopped, tmp_path):
    run_folder, outside = copy_of(stopped[1], tmp_path / "run"), tmp_path / "outside"
    (run_folder / "checkpoints").rename(outside)
    (run_folder / "checkpoints").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(UserError, match="leads out of"):
        run(EXPERIMENT, "tiny", run_folder, Listener(), resume=True)
    assert sorted(outside.rglob("*")) == before


def test_no_file_of_a_run_holds_a_secret(stopped):
    files = [path for out in stopped.values() for path in out.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_nothing_is_unpickled_or_evaluated():
    for name in ("cnnlib", "experiments"):
        for path in (Path(resume.__file__).parents[1] / name).rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = {getattr(call, "id", getattr(call, "attr", None)) for call in calls}
            assert not names & {"eval", "exec", "loads_pickle", "Unpickler"}, path
            # stream.py tells the processes that it has started what to read, through their own pipes; no file is read.
            pickles = () if path.name == "stream.py" else ("import pickle",)
            for unsafe in (*pickles, "allow_pickle=True", "import yaml", "import marshal", "import dill"):
                assert unsafe not in path.read_text(), (path, unsafe)


# In processes of their own, by really doing it. The data are the packaged ones.

# Nets that train for longer than the writer of checkpoints takes to start.
TINY = ["arms=mlp_75_33,lenet5", "epochs=4", "lanes.seed=0,1", "checkpoint.share=1"]
DIVERGING = ["optim.name=sgd", "optim.learning_rate=0.01,1e8"]


def command(out, *arguments):
    return [sys.executable, "-m", "experiments", "run", "fc_vs_conv", *TINY, "--out", str(out), *arguments]


def environment(**change):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled", **change}


def done(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), **options)


@contextlib.contextmanager
def started(out, *arguments):
    """A run that has told its first epoch; killed in the end, if it lives."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(out, *arguments), **pipes, env=environment()) as process:
        assert process.stdout is not None
        try:
            while "epoch 1/" not in process.stdout.readline():
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def limited(limit, *command):
    """In a shell with a `ulimit`."""
    return done("bash", "-c", f'ulimit {limit}; exec "$@"', "-", *command)


def finished(out, *arguments):
    """An uninterrupted run."""
    whole = done(*command(out, *arguments))
    assert whole.returncode == 0, whole.stderr
    return out


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("packaged"))


def killed_twice_and_resumed(whole, out, chance, *arguments):
    """Kill a run, and once more when it goes on; then it must end as the `whole` one.

    The first kill waits for a checkpoint of the arm that trains longest. Returns what each session found.
    """
    for again in ([], ["--resume"]):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command(out, *arguments, *again), **pipes, env=environment()) as process:
            if not again:
                while not any(out.glob("checkpoints/lenet5/[0-9]*")):
                    assert process.poll() is None
                    time.sleep(0.01)
            else:
                epochs = (line for line in process.stdout if re.search(r"epoch \d+/", line))
                for _ in itertools.islice(epochs, chance.randrange(1, 8)):
                    pass
                time.sleep(chance.uniform(0.0, 0.2))  # epochs take about as long
            process.kill()
    resumed = done(*command(out, *arguments, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(out) == comparable(whole)
    return json.loads((out / "results.json").read_text())["resumed"]


@pytest.mark.slow
def test_a_run_that_is_killed_twice_with_lanes_that_diverge_is_resumed_to_the_same_bits(tmp_path):
    whole = finished(tmp_path / "whole", *DIVERGING)
    for arm in json.loads((whole / "results.json").read_text())["arms"]:
        assert [lane["status"] for lane in arm["lanes"]] == ["ok", "ok", "diverged", "diverged"]
    # Once as soon as the arm that trains longest has a checkpoint, and once at a random moment.
    sessions = killed_twice_and_resumed(whole, tmp_path / "killed", random.Random(0), *DIVERGING)
    assert any(session["in_flight"] for session in sessions)


@pytest.mark.slow
def test_a_signal_ends_the_run_at_the_end_of_an_epoch(packaged, tmp_path):
    with started(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 143
    first, last = told.splitlines()
    assert first == "stopping at the end of this epoch, and saving it; once more stops at once"
    assert last.startswith("stopped after epoch ") and last.endswith("--resume")
    resumed = done("bash", "-c", last.split("go on with: ")[1].replace("python ", f"{sys.executable} ", 1))
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(tmp_path) == comparable(packaged)


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(tmp_path):
    with started(tmp_path, "epochs=1000", "passes=30") as process:  # epochs of some seconds
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 130 and told == ""  # not the end of the epoch, and how to go on


@pytest.mark.slow
def test_a_second_run_into_the_folder_is_refused(tmp_path):
    with started(tmp_path, "epochs=1000") as process:
        for arguments in ((), ("--resume",)):
            second = done(*command(tmp_path, *arguments))
            assert second.returncode == 2 and f"a run is going on in {tmp_path} (process {process.pid}" in second.stderr
            assert len(second.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_a_clear_error_and_costs_nothing_that_was_saved(packaged, tmp_path):
    with started(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    kept = {path.name for arm in (tmp_path / "checkpoints").iterdir() for path in arm.iterdir()}
    refused = limited("-f 40", *command(tmp_path, "--resume"))  # files of 40 kB: the next checkpoint does not fit
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "cannot write" in refused.stderr
    assert kept <= {path.name for arm in (tmp_path / "checkpoints").iterdir() for path in arm.iterdir()}
    resumed = done(*command(tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(tmp_path) == comparable(packaged)


@pytest.mark.slow
def test_a_full_disk_and_one_that_is_only_read_are_clear_errors(tmp_path):
    """On file systems made for it, where this user may mount some."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=2m none {disk} || exit 77
        test $1 = rw || mount -o remount,ro {disk}
        shift; "$@"; status=$?
        ls {disk}/run/checkpoints/* >&2; exit $status
    """
    if done("unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)).returncode != 0:
        pytest.skip("no right to mount anything here")
    full = done("unshare", "-rm", "bash", "-c", script, "-", "rw", *command(disk / "run"))
    first, *rest = full.stderr.splitlines()
    assert full.returncode == 2 and first.startswith("error: cannot write") and "No space left" in first, full.stderr
    assert "1" in rest  # the checkpoint that was whole
    read_only = done("unshare", "-rm", "bash", "-c", script, "-", "ro", *command(disk / "run"))
    assert read_only.returncode == 2 and "Read-only file system" in read_only.stderr.splitlines()[0]


@pytest.mark.slow
def test_too_little_memory_says_which_arm_and_how_many_lanes_would_fit(tmp_path):
    code = "import jax, cnnlib.run; jax.devices(); print(open('/proc/self/status').read())"
    taken = int(re.search(r"VmSize:\s*(\d+) kB", done(sys.executable, "-c", code).stdout)[1])
    many = ["arms=lenet5", "devices=1", "lanes.seed=0..63", "lanes.at_a_time=64", "batch_size=500", "epochs=1"]
    many += ["data.train=1000"]
    # How many addresses compilers and threads take depends on the machine, and LLVM gives up without a word to us.
    for spare in range(1_000_000, 4_500_000, 500_000):
        limit = f"-v {taken + spare}"
        refused = limited(limit, *command(tmp_path / "run", *many))
        if "would fit" in refused.stderr:
            break
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert refused.stderr.startswith("error: arm lenet5: 64 lanes, 64 at a time, need ")
    fits = int(refused.stderr.rsplit("would fit: lanes.at_a_time=", 1)[1])
    assert 1 <= fits < 64 and not (tmp_path / "run").exists()
    more = f"-v {taken + spare + 250_000}"  # addresses that the parts of LLVM and stacks of threads leave unused
    fitting = limited(more, *command(tmp_path / "run", *many, f"lanes.at_a_time={fits}"))
    assert fitting.returncode == 0, fitting.stderr
