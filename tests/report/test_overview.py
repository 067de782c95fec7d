"""`runs` and `compare`: what they say of folders that are known."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import pytest
from made_results import arm, lane, line, record, results

from cnnlib.cli.main import main
from cnnlib.config.fields import to_dict
from cnnlib.errors import UserError
from cnnlib.report import overview
from cnnlib.runs.folder import RunFolder

CONFIG = {"epochs": 4, "arms": [{"name": "a", "model": "dense:3"}], "optim": {"learning_rate": [0.1]}}
RESULTS = to_dict(
    results(
        *(
            arm(name, [lane(0, low), lane(1, high, parameters_sha256=name * 64)], parameters=1234)
            for name, low, high in (("a", 0.89, 0.91), ("b", 0.79, 0.81))
        ),
        experiment="tiny",
        config=CONFIG,
    )
)


def made(folder, state, results=None, epochs=0):
    with RunFolder(folder) as held:
        held.write(record())
        (folder / "config.json").write_text(
            json.dumps({"experiment": "tiny", "epochs": 4, "arms": [{"name": "a"}] * 2})
        )
        lines = [
            vars(line(lane, epoch, validation_accuracy=0.5 + 0.1 * lane))
            for epoch in range(1, epochs + 1)
            for lane in (0, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + '{"arm": "a", "ep')
        if results:
            (folder / "results.json").write_text(json.dumps(results))
        if state != "running":
            held.end_session(state, "the disk is full")


def table(tmp_path):
    return {
        row[0]: row[1:2] + row[3:]
        for row in (overview.described(run, tmp_path) for run in overview.found_runs(tmp_path))
    }


def test_runs_are_listed_with_state_progress_and_result(tmp_path, capsys, monkeypatch):
    made(tmp_path / "tiny_done", "finished", RESULTS, epochs=4)
    made(tmp_path / "deep" / "cut", "running", epochs=3)  # and then the process was killed
    made(tmp_path / "tiny_failed", "failed", epochs=1)
    (tmp_path / "tiny_done" / "earlier" / "x").mkdir(parents=True)
    (tmp_path / "tiny_done" / "earlier" / "x" / "results.json").write_text("{}")
    assert table(tmp_path) == {
        "tiny_done": ("finished", "50 %", "a 90.00 [77.29, 102.71]"),
        "deep/cut (tiny)": ("interrupted", "37 %", "a 3/4, validation 55.00 %"),
        "tiny_failed": ("failed", "12 %", "the disk is full"),
    }
    with RunFolder(tmp_path / "deep" / "cut"):
        assert table(tmp_path)["deep/cut (tiny)"][0] == "running"
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80 and shown[1].split() == ["run", "state", "began", "done", "result"]


def test_where_there_are_no_runs_it_is_said(tmp_path, capsys):
    for place, part in ((tmp_path, "there are no runs in"), (tmp_path / "none", "there is no folder")):
        assert main(["runs", str(place)]) == 2
        assert part in capsys.readouterr().err


def test_runs_side_by_side_show_accuracies_and_what_differs(tmp_path, capsys):
    other = copy.deepcopy(RESULTS)
    other["config"]["epochs"] = 8
    other["arms"][1]["lanes"][1]["parameters_sha256"] = "f" * 64
    made(tmp_path / "x", "finished", RESULTS)
    made(tmp_path / "y", "finished", other)
    made(tmp_path / "z" / "x", "finished", RESULTS)
    made(tmp_path / "cut", "interrupted")
    assert main(["compare", str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown if line.startswith("a ")] == [["a", "x", "1,234"], ["a", "y", "1,234"]]
    assert shown[-2:] == ["epochs: x 4, y 8", "the same parameters, bit for bit: a"]
    assert main(["compare", str(tmp_path / "x"), str(tmp_path / "z" / "x")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the parameters of every lane are the same, bit for bit"
    for folders, part in (
        ([tmp_path / "cut"], "its run is interrupted"),
        ([tmp_path / "x"], "different runs"),
        ([], "two runs"),
    ):
        assert main(["compare", str(tmp_path / "x"), *map(str, folders)]) == 2
        assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("kind", "TPU v5e", "x on cpu, precision default, y on TPU v5e, precision default"),
        ("precision", "highest", "x on cpu, precision default, y on cpu, precision highest"),
    ],
)
def test_devices_and_precisions_are_not_mixed_unless_asked_for(field, value, told, tmp_path, capsys):
    other = copy.deepcopy(RESULTS)
    other["device"][field] = value
    made(tmp_path / "x", "finished", RESULTS)
    made(tmp_path / "y", "finished", other)
    folders = [str(tmp_path / "x"), str(tmp_path / "y")]
    assert main(["compare", *folders]) == 2
    text = capsys.readouterr().err
    assert told in text and "--mixed compares them all the same" in text and len(text.splitlines()) == 1
    assert main(["compare", *folders, "--mixed"]) == 0
    assert value in capsys.readouterr().out


def test_runs_of_other_arms_have_no_parameters_in_common(tmp_path):
    one = results(*(arm(name, [lane(0, 0.5)]) for name in "ab"))
    assert overview.fingerprints([one, replace(one, arms=one.arms[1:])]) == []
    with pytest.raises(UserError, match="different runs"):
        overview.labels([tmp_path, tmp_path])


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    made(tmp_path / "run", "interrupted", epochs=1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")  # whoever opens one waits until somebody writes
    assert main(["runs", str(tmp_path)]) == 0
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"mean": 10**400, "ci95": [0.1, 0.2], "n": 2},
        {"mean": 0.9, "ci95": [0.1, "high"], "n": 2},
        {"mean": True, "ci95": [None, None], "n": 2},
        {"ci95": [None, None], "n": 2},
        {"mean": 0.9, "ci95": [0.1, None], "n": 2},
    ],
)
def test_numbers_that_are_none_are_no_results(tmp_path, capsys, change):
    damaged = copy.deepcopy(RESULTS)
    damaged["arms"][0]["test_accuracy"] = change
    for name in ("one", "two"):
        made(tmp_path / name, "finished", damaged)
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "one/results.json is damaged: " in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0


def test_results_of_a_newer_version_are_refused_in_one_line_and_those_without_a_format_are_read(tmp_path, capsys):
    old = {key: value for key, value in RESULTS.items() if key != "format"}
    for name, found in (("new", {**RESULTS, "format": 3}), ("ours", RESULTS), ("old", old)):
        made(tmp_path / name, "finished", found)
    assert main(["compare", str(tmp_path / "ours"), str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "results.json has format 3, and this version reads format 2: a newer cnnlib reads it" in line
    assert main(["compare", str(tmp_path / "ours"), str(tmp_path / "old")]) == 0


def test_text_that_cannot_be_shown_is_no_error(tmp_path, capsys):
    made(tmp_path / "one", "finished", {**RESULTS, "experiment": "\ud800 half a pair"})
    assert main(["runs", str(tmp_path)]) == 0
