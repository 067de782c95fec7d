"""The folder of a run: one at a time, whatever its holder dies of; and nothing outside of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from cnnlib.errors import UserError
from cnnlib.runs import folder
from cnnlib.runs.folder import RunFolder, inside, is_locked, state

HOLD = """
import sys, time
from pathlib import Path
from cnnlib.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])) as held:
    held.begin_session({"experiment": "tiny", "identity": {}})
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder `run`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(holder, tmp_path):
    run = tmp_path / "run"
    assert is_locked(run) and state(run) == "running"
    for attempt in (folder.check, RunFolder):
        with pytest.raises(UserError, match=rf"a run is going on in .*run \(process {holder.pid} on "):
            attempt(run)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_locked(run) and state(run) == "interrupted"
    folder.check(run)
    with RunFolder(run) as held:
        assert held.read_record() and held.record["sessions"][0]["pid"] == holder.pid


def test_sessions_say_how_they_ended(tmp_path):
    for ending in ("interrupted", "failed", "finished"):
        with RunFolder(tmp_path) as held:
            held.read_record()
            held.begin_session({"experiment": "tiny", "identity": {"a": 1}})
            assert state(tmp_path) == "running"
            held.end_session(ending, "why")
        assert state(tmp_path) == ending
    record = json.loads((tmp_path / "run.json").read_text())
    assert [session["state"] for session in record["sessions"]] == ["interrupted", "failed", "finished"]
    assert len({session["pid"] for session in record["sessions"]}) == 1 and record["identity"] == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"id": 3}', "[" * 100_000),
        '{"id": "a/../..", "identity": {}, "experiment": "x", "sessions": []}',
        '{"id": "a", "identity": {}, "experiment": "x", "sessions": [{"state": "well"}]}',
    ],
)
def test_a_record_that_is_none_is_not_believed(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with RunFolder(tmp_path) as held:
        assert not held.read_record() and held.record == {}
    assert state(tmp_path) == "interrupted"


def test_what_leads_out_of_the_folder_is_refused(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (run / "link").symlink_to(outside)
    assert inside(run, run / "arms" / "a.json") == run / "arms" / "a.json"
    for path in (run / "link", run / "link" / "x", run / ".." / "outside", run / "arms" / ".." / ".." / "x"):
        with pytest.raises(UserError, match="leads out of"):
            inside(run, path)


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write to"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "precious").stat().st_size == 0
