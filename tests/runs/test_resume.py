"""A run that was interrupted, however, ends with what an uninterrupted one ends with."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_results import IDENTITY
from resuming import EXPERIMENT, Listener, comparable, interrupted, stop_after

import cnnlib
from cnnlib import experiments
from cnnlib.config.fields import to_dict
from cnnlib.config.schema import Arm, Lanes, Optim
from cnnlib.errors import Stopped, UserError
from cnnlib.runs.identity import check_alike, identity_changes
from cnnlib.runs.results import Machine, read_results
from cnnlib.runs.runner import run
from cnnlib.runs.session import Options
from cnnlib.spec.notation import parse_model
from cnnlib.train.multihost import Hosts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(EXPERIMENT, "tiny", out, Listener())
    return out


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
        run(EXPERIMENT, "tiny", tmp_path, watcher, Options(resume=True), stop=stop)
    assert watcher.epochs[:3] == [("full", 2), ("full", 3), ("conv", 1)]
    watcher = Listener()
    results = run(EXPERIMENT, "tiny", tmp_path, watcher, Options(resume=True))
    assert "finished before: full" in watcher.said
    assert comparable(tmp_path) == comparable(whole)
    assert [len(entry.finished) for entry in results.resumed] == [0, 1]
    assert results.resumed[0].in_flight == {"full": 1} and results.resumed[0].changes == ()


@pytest.mark.once
def test_a_finished_run_is_left_alone(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    watcher = Listener()
    results = run(EXPERIMENT, "tiny", whole, watcher, Options(resume=True))
    assert watcher.said[-1].endswith("is finished: there is nothing left to do") and watcher.epochs == []
    assert results == read_results(whole)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_results_that_were_lost_are_put_together_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{")
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "run", watcher, Options(resume=True))
    assert "finished before: full, conv" in watcher.said
    assert watcher.epochs == [] and comparable(tmp_path / "run") == comparable(whole)


@pytest.mark.slow
def test_where_there_is_no_run_one_begins_and_says_so(whole, tmp_path):
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "new", watcher, Options(resume=True))
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
    run(EXPERIMENT, "tiny", out, watcher, Options(resume=True))
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
    run(EXPERIMENT, "tiny", out, watcher, Options(resume=True))
    assert "full has no checkpoint to go on from: it starts anew" in watcher.said
    assert comparable(out) == comparable(whole)


@pytest.mark.once
def test_an_arm_whose_last_checkpoint_is_all_there_is_is_tested_and_kept(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "arms")
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "run", watcher, Options(resume=True))
    assert watcher.epochs == [] and comparable(tmp_path / "run") == comparable(whole)
    assert {path.name for path in (tmp_path / "run" / "arms").iterdir()} == {"full.json", "conv.json"}


@pytest.mark.slow
def test_arms_of_other_seeds_are_no_results_of_this_configuration(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    other = replace(EXPERIMENT, lanes=Lanes(seed=(7, 8)))
    with pytest.raises(UserError, match=r"lanes.seed was 3,4, is 7,8"):
        run(other, "tiny", tmp_path / "run", Listener(), Options(resume=True))
    results = run(other, "tiny", tmp_path / "run", Listener(), Options(resume=True, force=True))
    assert [[lane.seed for lane in arm.lanes] for arm in results.arms] == [[7, 8, 7, 8]] * 2


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_gone_on_from(whole, stopped, tmp_path):
    out = copy_of(stopped[1], tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(whole / "checkpoints", out / "checkpoints")
    watcher = Listener()
    run(EXPERIMENT, "tiny", out, watcher, Options(resume=True))
    assert any("its run is not that of this run" in text for text in watcher.said)
    assert watcher.epochs[0] == ("full", 1) and comparable(out) == comparable(whole)


@pytest.mark.slow
def test_what_has_changed_is_said_and_refused_unless_forced(stopped, tmp_path):
    out = copy_of(stopped[1], tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = replace(EXPERIMENT, batch_size=100)
    with pytest.raises(UserError, match=r"cannot be resumed to the same numbers: batch_size was 200, is 100; --force"):
        run(changed, "tiny", out, Listener(), Options(resume=True))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    watcher = Listener()
    results = run(changed, "tiny", out, watcher, Options(resume=True, force=True))
    assert "since the run began: batch_size was 200, is 100" in watcher.said and watcher.epochs[0] == ("full", 2)
    (entry,) = results.resumed
    assert entry.changes == ("batch_size was 200, is 100",) and entry.forced


def test_other_code_libraries_data_and_devices_are_refused_and_another_processor_is_said():
    before = IDENTITY
    assert identity_changes(before, before) == ([], [])

    def found(**change):
        return identity_changes(before, replace(before, **change))

    for change in (
        {"experiment": "other"},
        {"code_sha256": "c" * 64},
        {"data_sha256": "c" * 64},
        {"versions": {"jax": "0.12.0", "python": "3.11.7"}},
        {"device": {"platform": "gpu", "kind": "cpu", "kernels": "native"}},
        {"device": {"platform": "cpu", "kind": "cpu", "kernels": "xla"}},
        {"settings": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}},
        {"config": {**before.config, "epochs": 4}},
    ):
        assert len(found(**change).refused) == 1 and not found(**change).told
    for change in (
        {"machine": Machine("two", 2)},
        {"devices": 2},
        {"versions": {"jax": "0.10.2", "python": "3.11.8"}},
        {"config": {**before.config, "lanes.at_a_time": 2}},
    ):
        assert not found(**change).refused and len(found(**change).told) == 1
    assert found(config={**before.config, "checkpoint.every": 2, "data.data_dir": "/data"}) == ([], [])


def test_fields_that_an_arm_has_of_its_own_are_told_apart_as_those_of_all():
    def found(*own):
        sides = (replace(IDENTITY, config={"arms.full.own": [*texts]}) for texts in (("epochs=3",), own))
        return identity_changes(*sides)

    assert found("epochs=4") == (["arms.full.epochs was 3, is 4"], [])
    assert found() == (["arms.full.epochs was 3, is None"], [])
    assert found("epochs=3", "accumulate=2") == ([], ["arms.full.accumulate was None, is 2"])
    assert found("epochs=3", "data.workers=2", "checkpoint.keep=3") == ([], [])


def test_of_data_that_are_streamed_only_on_one_side_no_sums_are_compared():
    other = replace(IDENTITY, data_sha256="c" * 64, streamed=("x",))
    assert identity_changes(IDENTITY, other).refused == ["streamed was nothing, is x"]


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
            return json.dumps(to_dict(replace(IDENTITY, config=config))).encode()

        def same(self, what, value):
            assert value == ("none" if told is None else told)

    check_alike(Other(), replace(IDENTITY, config={**config, **change}))


@pytest.mark.slow
def test_resumed_with_more_lanes_at_a_time_the_numbers_agree_to_rounding(whole, tmp_path):
    one = replace(EXPERIMENT, lanes=Lanes(seed=(3, 4), at_a_time=1))
    interrupted(tmp_path / "one", 1, one)
    out = copy_of(tmp_path / "one", tmp_path / "four")
    watcher = Listener()
    run(EXPERIMENT, "tiny", tmp_path / "one", watcher, Options(resume=True))  # goes on as it was
    assert not any("lanes at a time" in text for text in watcher.said)
    four = replace(EXPERIMENT, lanes=Lanes(seed=(3, 4), at_a_time=4))
    watcher = Listener()
    run(four, "tiny", out, watcher, Options(resume=True))
    assert any("4 lanes at a time, 1 before: the results agree to rounding" in text for text in watcher.said)
    for ours, theirs in zip(comparable(out)[1], comparable(whole)[1], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_lane_that_diverges_harms_no_other_and_stays_gone_after_a_resume(tmp_path):
    deep = (Arm("deep", parse_model("avg:4 conv:4@3 dense:8 dense:classes")),)
    sane = replace(EXPERIMENT, arms=deep, optim=Optim("sgd", learning_rate=(0.01,)))
    both = replace(sane, optim=Optim("sgd", learning_rate=(0.01, 1e8)))
    alone = run(sane, "tiny", tmp_path / "alone", Listener()).arms[0].lanes
    run(both, "tiny", tmp_path / "whole", Listener())
    interrupted(tmp_path / "resumed", 2, both)
    (arm,) = run(both, "tiny", tmp_path / "resumed", Listener(), Options(resume=True)).arms
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    assert [lane.status for lane in arm.lanes] == ["ok", "ok", "diverged", "diverged"]
    assert [lane.parameters_sha256 for lane in arm.lanes[:2]] == [lane.parameters_sha256 for lane in alone]
    assert [setting.test_accuracy.n for setting in arm.settings] == [2, 0]


def test_nothing_is_read_or_written_through_a_link_that_leads_out(stopped, tmp_path):
    run_folder, outside = copy_of(stopped[1], tmp_path / "run"), tmp_path / "outside"
    (run_folder / "checkpoints").rename(outside)
    (run_folder / "checkpoints").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(UserError, match="leads out of"):
        run(EXPERIMENT, "tiny", run_folder, Listener(), Options(resume=True))
    assert sorted(outside.rglob("*")) == before


def test_no_file_of_a_run_holds_a_secret(stopped):
    files = [path for out in stopped.values() for path in out.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_nothing_is_unpickled_or_evaluated():
    for package in (cnnlib, experiments):
        for path in Path(package.__file__).parent.rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = {getattr(call, "id", getattr(call, "attr", None)) for call in calls}
            assert not names & {"eval", "exec", "loads_pickle", "Unpickler"}, path
            # stream.py tells the processes that it has started what to read, through their own pipes; no file is read.
            pickles = () if path.name == "stream.py" else ("import pickle",)
            for unsafe in (*pickles, "allow_pickle=True", "import yaml", "import marshal", "import dill"):
                assert unsafe not in path.read_text(), (path, unsafe)
