"""The command line as a user meets it: in a process of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

TINY = ["data.name=lines", "data.validation=0", "epochs=1", "batch_size=500", "lanes.seed=0,1"]


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "80", **environment},
    )


def experiments(*arguments, cwd, **environment):
    return python("-m", "experiments", *arguments, cwd=cwd, **environment)


def test_list_has_a_line_an_experiment_with_its_question(tmp_path):
    done = experiments("list", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("fc_vs_conv "))
    assert line.endswith("?")


def test_show_tells_note_configuration_and_counts_and_trains_nothing(tmp_path):
    done = experiments("show", "fc_vs_conv", "epochs=3", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for part in ("Question:", "epochs=3", "266,610", "61,706", "416,520", "3,500 train"):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["list"], ["show", "fc_vs_conv"]])
def test_looking_imports_no_jax(command, tmp_path):
    code = "import sys; from experiments.__main__ import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    done = python("-c", code, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    return experiments("run", "fc_vs_conv", *TINY, "arms=mlp_75_33", cwd=folder), folder


def test_run_writes_its_files_and_ends_with_the_table(tiny_run):
    done, folder = tiny_run
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = folder / "runs" / "fc_vs_conv"
    names = {"config.json", "metrics.jsonl", "results.json", "table.md", "accuracy.png"}
    assert {path.name for path in out.iterdir()} == names
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["name"] == "lines" and len(results["arms"]) == 1
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for part in ("mlp_75_33", "61,485", "lines: 4,000 training", "epoch 1/1"):
        assert part in done.stdout
    assert "61,485" in (out / "table.md").read_text()


def test_a_second_run_keeps_the_first(tiny_run, tmp_path):
    _, folder = tiny_run
    out = folder / "runs" / "fc_vs_conv"
    before = (out / "results.json").read_bytes()
    done = experiments("run", "fc_vs_conv", *TINY, "arms=mlp_75_33", cwd=folder)
    assert done.returncode == 0 and "earlier" in done.stdout
    (kept,) = (out / "earlier").rglob("results.json")
    assert kept.read_bytes() == before


WRONG = [
    ([], "no command"),
    (["train"], "there are: list, show, run, count"),
    (["list", "fc_vs_conv"], "unrecognized arguments"),
    (["show"], "required: NAME"),
    (["show", "nothing"], "no experiment 'nothing'; there are: explosion, fc_vs_conv"),
    (["show", "fc_vs_conv", "epoch=3"], "no field 'epoch'; there are: arms"),
    (["run", "fc_vs_conv", "epochs"], "no override"),
    (["run", "fc_vs_conv", "epochs=many"], "whole number"),
    (["run", "fc_vs_conv", "--output", "x"], "unrecognized arguments"),
    (["run", "fc_vs_conv", "--out"], "expected one argument"),
    (["run", "fc_vs_conv", "--out", ""], "--out needs a folder"),
    (["show", "fc_vs_conv", "epochs=1\nx"], "epochs=1 x: expected a whole number"),
    (["run", "fc_vs_conv", "epochs=9999999999999"], "2**31 steps"),
    (
        ["run", "fc_vs_conv", "arms.lenet5.model=dense:99999999999 dense:classes"],
        "5 lanes of 79,499,999,999,215 parameters need 1,",
    ),
    (["run", "fc_vs_conv", "arms.lenet5.model=max:2:5 dense:classes"], "padding of 5"),
    (["run", "fc_vs_conv", "lanes.seed="], "at least one lane"),
    (["run", "fc_vs_conv", "batch_size=4001"], "batch_size=4001 is larger than the training data"),
    (["run", "fc_vs_conv", "data.validation=4000"], "leaves nothing to train on"),
    (["run", "fc_vs_conv", "arms.lenet5.model=conv:6@29:valid dense:classes"], "its map has only 28"),
    (["run", "fc_vs_conv", "arms.lenet5.model=conv:6@99 dense:classes"], "its map has only 28"),
    (["run", "fc_vs_conv", "data.name=nowhere"], "no data set 'nowhere'"),
    (["run", "fc_vs_conv", "augment.crop=29"], "larger than the examples"),
]


@pytest.mark.parametrize(("arguments", "part"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_what_the_user_got_wrong_is_one_line_and_status_2(arguments, part, tmp_path):
    done = experiments(*arguments, cwd=tmp_path, TFDS_DATA_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and part in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    done = experiments("run", "fc_vs_conv", *TINY, "--out", "file/x", cwd=tmp_path)
    assert done.returncode == 2 and "cannot write to file/x" in done.stderr and len(done.stderr.splitlines()) == 1


def test_traceback_shows_where_it_was_noticed(tmp_path):
    done = experiments("run", "fc_vs_conv", "epochs=0", "--traceback", cwd=tmp_path)
    assert "Traceback" in done.stderr and "epochs must be at least 1" in done.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m experiments show fc_vs_conv | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "fc_vs_conv\n" and done.stderr == ""
    nobody = f"{sys.executable} -u -m experiments show fc_vs_conv | true"  # unbuffered: the first print meets no reader
    assert subprocess.run(["bash", "-c", nobody], cwd=tmp_path, capture_output=True, check=False).stderr == b""


def test_a_run_goes_on_when_its_reader_stops(tmp_path):
    command = " ".join([sys.executable, "-m experiments run fc_vs_conv", *TINY, "arms=mlp_75_33 | head -n 1"])
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "runs" / "fc_vs_conv" / "table.md").exists()


def test_an_interruption_is_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments", "run", "fc_vs_conv", "arms=lenet5", "epochs=1000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while "epoch 1/1000" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
        assert process.wait() == 130


def test_what_nobody_foresaw_is_one_line_too_and_no_success(tmp_path):
    code = (
        "import sys, cnnlib.data; from experiments.__main__ import main\n"
        "def fails(data): raise KeyError('two\\nlines')\n"
        "cnnlib.data.describe = fails; sys.exit(main(['show', 'fc_vs_conv']))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "unexpected KeyError" in done.stderr


def test_help_is_there(tmp_path):
    assert "run NAME" in experiments("--help", cwd=tmp_path).stdout
    assert "FIELD=VALUE" in experiments("run", "--help", cwd=tmp_path).stdout
