"""The folder of a run: one at a time, whatever its holder dies of; and nothing outside of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import made_results
import pytest
from made_results import record

from cnnlib.errors import UserError
from cnnlib.runs import folder
from cnnlib.runs.folder import RunFolder, inside, is_locked, state
from cnnlib.runs.record import read_record

HOLD = """
import sys, time
from pathlib import Path
from made_results import record
from cnnlib.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])) as held:
    held.write(record())
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder `run`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(made_results.__file__).parent)},
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
        assert held.record is None and read_record(run).sessions[0].pid == holder.pid


def test_sessions_say_how_they_ended(tmp_path):
    for ending in ("interrupted", "failed", "finished"):
        with RunFolder(tmp_path) as held:
            held.write(record(read_record(tmp_path).sessions if ending != "interrupted" else ()))
            assert state(tmp_path) == "running"
            held.end_session(ending, "why")
        assert state(tmp_path) == ending
    sessions = read_record(tmp_path).sessions
    assert [session.state for session in sessions] == ["interrupted", "failed", "finished"]
    assert {session.pid for session in sessions} == {os.getpid()}


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
    with pytest.raises(UserError):
        read_record(tmp_path)
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
