"""The command line as a user meets it: in an empty folder, and where that may matter in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cnnlib.cli import training
from cnnlib.cli.main import main
from cnnlib.config.schema import EXPERIMENTS
from cnnlib.demos import DEMOS

TINY = ["data.name=lines", "data.validation=0", "epochs=1", "batch_size=500", "lanes.seed=0,1"]


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled", "COLUMNS": "80", **environment},
    )


def experiments(*arguments, cwd, **environment):
    return python("-m", "cnnlib", *arguments, cwd=cwd, **environment)


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working directory, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.mark.once
def test_list_has_a_line_an_experiment_with_its_question(here, capfd):
    assert main(["list"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    (line,) = (line for line in told.out.splitlines() if line.startswith("fc_vs_conv "))
    assert line.endswith("?")


@pytest.mark.once
def test_show_tells_note_configuration_and_counts_and_trains_nothing(tmp_path):
    done = experiments("show", "fc_vs_conv", "epochs=3", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for part in ("Question:", "epochs=3", "266,610", "61,706", "416,520", "3,500 train"):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_looking_imports_no_jax(tmp_path):
    commands = [
        ["list"],
        ["show", "fc_vs_conv"],
        ["show", "explosion"],
        ["run", "explosion"],
        ["count", "fc_vs_conv"],
        ["count", "lenet5", "--input", "28x28x1"],
    ]
    code = (
        "import json, sys; from cnnlib.cli.main import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    assert main(command) == 0 and 'jax' not in sys.modules, command"
    )
    done = python("-c", code, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.once
def test_list_finds_the_experiments_from_any_folder_and_needs_no_numpy(tmp_path):
    (tmp_path / "experiments").mkdir()  # somebody's own folder of that name is not ours
    code = (
        "import sys; from cnnlib.cli.main import main\n"
        "assert main(['list']) == 0 and not {'jax', 'numpy'} & set(sys.modules)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.split("\n\n")[0].splitlines()]
    assert names == list(EXPERIMENTS)
    demos = [line.split()[0] for line in done.stdout.split("\n\n")[2].splitlines()]
    assert demos == list(DEMOS)


COUNTS = ("parameters", "weights", "connections", "connections_without_padding", "macs", "macs_without_padding")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("dense:3072 --input 32x32x3", (9_440_256, 9_437_184, 9_437_184, 9_437_184, 9_437_184, 9_437_184)),
        ("conv:3@3x3 --input 32x32x3", (84, 81, 82_944, 79_524, 82_944, 79_524)),
        ("conv:2@2x2 --input 4x4x1", (10, 8, 128, 98, 128, 98)),
        ("local:3@3x3 relu max:2 --input 32x32x3", (86_016, 82_944, 82_944, 79_524, 82_944, 79_524)),
        ("conv:32@5x5/2:valid --input 28x28x1", (832, 800, 115_200, 115_200, 115_200, 115_200)),
        ("lenet5 --input 28x28x1", (61_706, 61_470, 416_520, 406_656, 416_520, 406_656)),
    ],
)
@pytest.mark.once
def test_count_prints_exact_json(arguments, expected, capsys):
    assert main(["count", *arguments.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["total"][name] for name in COUNTS) == expected
    for name in (*COUNTS, "activations"):
        assert found["total"][name] == sum(layer[name] for layer in found["layers"])
    assert found["total"]["receptive_field"] == found["layers"][-1]["receptive_field"]


@pytest.mark.once
def test_count_of_the_articles_image_takes_less_than_a_second_and_100_megabytes(tmp_path):
    code = (
        "import json, resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, '-m', 'cnnlib', *sys.argv[1:]], capture_output=True, text=True); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([done.returncode, done.stdout, used.ru_utime + used.ru_stime, used.ru_maxrss]))"
    )

    def measured(*arguments):
        return json.loads(python("-c", code, "count", *arguments, cwd=tmp_path).stdout)

    status, text, seconds, kilobytes = measured("dense:1000000", "--input", "1000x1000x1")
    assert status == 0 and "1,000,000,000,000" in text and kilobytes < 100_000
    # A second is what it may take, of the processor's time. A slow or busy one takes longer, for a single node as well.
    assert seconds < 1 or seconds < 2 * measured("dense:1", "--input", "1x1x1")[2]


@pytest.mark.once
def test_count_shows_a_table_a_layer_that_fits_80_columns(here, capfd):
    assert main(["count", "lenet5", "--input", "28x28x1"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if line.startswith("3 conv:16@5:valid"))
    assert row.split() == ["3", "conv:16@5:valid", "10x10x16", "2,416", "240,000", "240,000", "14"]
    (total,) = (line for line in lines if line.startswith("total"))
    assert total.split() == ["total", "61,706", "416,520", "416,520", "all"]
    assert "406,656" in told.out and "241.0 KiB" in told.out


@pytest.mark.once
def test_count_of_an_experiment_has_all_its_arms(capsys):
    assert main(["count", "sharing_and_locality", "arms=conv,local,conv_macs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert found["experiment"] == "sharing_and_locality" and list(arms) == ["conv", "local", "conv_macs"]
    assert arms["local"]["total"]["parameters"] == 423_038 and arms["local"]["connectivity"] == "local"
    # Its budget is that of an arm that is left out.
    assert arms["conv_macs"]["match"]["target"] == 675_376
    assert arms["conv_macs"]["match"]["value"] == arms["conv_macs"]["total"]["macs"]


@pytest.mark.once
def test_count_reads_another_way_and_matches_a_budget(capsys):
    arguments = ["lenet5", "--input", "28x28x1", "--connectivity", "local", "--match", "parameters:lenet5"]
    assert main(["count", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["connectivity"] == "local" and found["match"]["target"] == 61_706
    assert found["match"]["value"] == found["total"]["parameters"] == 63_895
    assert main(["count", *arguments]) == 0
    assert "matched: 63,895 parameters for 61,706 (+3.5 %)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("lenet5", "count lenet5 needs the shape of an example: --input HxWxC"),
        ("explosion", "needs the shape of an example"),
        ("nothing --input 3x3x1", "no layer 'nothing'; there are: conv:FEATURES"),
        ("nothing --input 3x3x1", "or an experiment or architecture: augmentation, depth, dsd, explosion"),
        ("dense:3 --input 32x32x", "'32x32x' is no shape of an example"),
        ("conv:3@5:valid --input 4x4x1", "layer 0 (conv:3@5:valid) on 4x4x1"),
        ("dense:3 --input 4x4x1 --batch-size 0", "must be at least 1"),
        ("dense:3 --input 4x4x1 --connectivity local", "no layer of dense:3 has a window to be read so"),
        ("lenet5 --input 28x28x1 --connectivity full --match parameters:5", "5 parameters cannot be reached"),
        ("dense:5 dense:classes relu --input 7 --match parameters:5000", "are not its last layer, and no width"),
        (f"dense:{'9' * 4000} --input 8x8x3", "units must be in 1..1,000,000,000,000,000"),
        (f"lenet5 --input 28x28x1 --batch-size {'9' * 400}", "and at most 1,000,000,000"),
        ("lenet5 --input 28x28x1 --match flops:5", "match=flops:5 is no MEASURE:REFERENCE"),
        ("lenet5 --input 28x28x1 --match macs:resnet", "no number, arm (lenet5) or architecture (alexnet_v2"),
    ],
)
@pytest.mark.once
def test_what_count_cannot_do_is_one_line_and_status_2(arguments, part, capsys):
    assert main(["count", *arguments.split()]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and part in told.err


@pytest.mark.once
def test_long_and_branched_models_are_counted_in_no_time(capsys):
    branches, layers = "residual(relu) " * 60, "conv:1@1 " * 600
    assert main(["count", branches, layers, "dense:10", "--input", "8x8x3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["receptive_field"] == [8, 8]


@pytest.mark.once
def test_a_narrow_and_a_wide_layer_are_matched_in_no_time(capsys):
    arguments = ["dense:1", "dense:999999", "dense:10", "--input", "7", "--match", "parameters:6000001", "--json"]
    assert main(["count", *arguments]) == 0
    match = json.loads(capsys.readouterr().out)["match"]
    assert abs(match["value"] - match["target"]) < 0.001 * match["target"]


@pytest.mark.once
def test_a_growth_is_shown_and_run(here, capfd):
    assert main(["show", "explosion", "sides=8,32"]) == 0
    assert "9,437,184" in capfd.readouterr().out and list(here.iterdir()) == []
    assert main(["run", "explosion", "sides=8,32"]) == 0
    told = capfd.readouterr()
    assert told.err == "" and max(map(len, told.out.splitlines())) <= 80
    assert visible(here / "runs" / "explosion") == {"config.json", "results.json", "table.md", "growth.png"}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    return experiments("run", "fc_vs_conv", *TINY, "arms=mlp_75_33", cwd=folder), folder


def test_run_writes_its_files_and_ends_with_the_table(tiny_run):
    done, folder = tiny_run
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = folder / "runs" / "fc_vs_conv"
    names = {"config.json", "metrics.jsonl", "results.json", "table.md", "accuracy.png", "environment.json", "log.txt"}
    assert visible(out) - {"git.diff"} == names | {"run.json", "arms", "checkpoints", "predictions"}
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["name"] == "lines" and len(results["arms"]) == 1
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for part in ("mlp_75_33", "61,485", "lines: 4,000 training", "epoch 1/1"):
        assert part in done.stdout
    assert "61,485" in (out / "table.md").read_text()


@pytest.mark.slow
def test_a_second_run_keeps_the_first_and_goes_on_when_its_reader_stops(tiny_run):
    _, folder = tiny_run
    out = folder / "runs" / "fc_vs_conv"
    before = (out / "results.json").read_bytes()
    command = " ".join([sys.executable, "-m cnnlib run fc_vs_conv", *TINY, "arms=mlp_75_33 | grep -m 1 earlier"])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    (kept,) = (out / "earlier").rglob("results.json")
    assert kept.read_bytes() == before
    assert (out / "table.md").exists()  # written after its reader had stopped


WRONG = [
    ([], "no command"),
    (["train"], "there are: list, show, count, run, merge, all, runs, compare, report, results, wandb, check, demo"),
    (["list", "fc_vs_conv"], "unrecognized arguments"),
    (["show"], "required: NAME"),
    (["show", "nothing"], "no experiment 'nothing'; there are: augmentation, depth, dsd, explosion"),
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
        "5 lanes of 79,499,999,999,215 parameters need ",
    ),
    (["run", "fc_vs_conv", "arms.lenet5.model=max:2:5 dense:classes"], "padding of 5"),
    (["run", "fc_vs_conv", "lanes.seed="], "at least one lane"),
    (["run", "fc_vs_conv", "batch_size=4001"], "batch_size=4001 is larger than the training data"),
    (["run", "fc_vs_conv", "data.validation=4000"], "leaves nothing to train on"),
    (["run", "fc_vs_conv", "arms.lenet5.model=conv:6@29:valid dense:classes"], "its map has only 28"),
    (["run", "fc_vs_conv", "arms.lenet5.model=conv:6@99 dense:classes"], "its map has only 28"),
    (["run", "fc_vs_conv", "data.name=nowhere"], "no data set 'nowhere'"),
    (["run", "fc_vs_conv", "augment.crop=29"], "larger than the examples"),
    (["run", "explosion", "--resume"], "trains nothing"),
    (["run", "explosion", "--wandb", "online"], "trains nothing"),
    (["run", "explosion", "--distributed"], "trains nothing"),
    (["run", "explosion", "--process-id", "0"], "trains nothing"),
    (["run", "fc_vs_conv", "--process-id", "0"], "--process-id and --heartbeat need --distributed"),
    (["run", "fc_vs_conv", "--distributed", "--coordinator", "nowhere"], "must be HOST:PORT"),
    (["run", "fc_vs_conv", "mesh=2"], "mesh must be two numbers"),
    (["run", "fc_vs_conv", "accumulate=3"], "accumulate=3 does not divide batch_size"),
    (["run", "fc_vs_conv", "data.name=lines_8x8"], "lines_8x8"),
]


# What a new process does differently: no command, no such field, and an error after JAX was imported and has computed.
IN_A_PROCESS = ([], ["show", "fc_vs_conv", "epoch=3"], ["run", "fc_vs_conv", "data.name=nowhere"])


@pytest.mark.parametrize(("arguments", "part"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
@pytest.mark.once
def test_what_the_user_got_wrong_is_one_line_and_status_2(arguments, part, here, capfd, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(here))
    assert main(arguments) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1 and part in told.err
    assert list(here.iterdir()) == []
    if arguments in IN_A_PROCESS:
        done = experiments(*arguments, cwd=here)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", told.err)
        assert list(here.iterdir()) == []


@pytest.mark.once
def test_an_output_folder_that_cannot_be_made_is_said(here, capfd):
    (here / "file").write_text("")
    assert main(["run", "fc_vs_conv", *TINY, "--out", "file/x"]) == 2
    told = capfd.readouterr().err
    assert "cannot write to file/x" in told and len(told.splitlines()) == 1


@pytest.mark.once
def test_traceback_shows_where_it_was_noticed(tmp_path):
    done = experiments("run", "fc_vs_conv", "epochs=0", "--traceback", cwd=tmp_path)
    assert "Traceback" in done.stderr and "epochs must be at least 1" in done.stderr


@pytest.mark.once
def test_a_reader_that_stops_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m cnnlib show fc_vs_conv | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "fc_vs_conv\n" and done.stderr == ""
    nobody = f"{sys.executable} -u -m cnnlib show fc_vs_conv | true"  # unbuffered: the first print meets no reader
    assert subprocess.run(["bash", "-c", nobody], cwd=tmp_path, capture_output=True, check=False).stderr == b""


@pytest.mark.once
def test_what_nobody_foresaw_is_one_line_too_and_no_success(here, capfd, monkeypatch):
    def fails(data):
        raise KeyError("two\nlines")

    monkeypatch.setattr("cnnlib.data.sets.describe", fails)
    assert main(["count", "fc_vs_conv"]) == 1
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "unexpected KeyError" in told


@pytest.mark.once
def test_help_is_there(capfd):
    assert main(["--help"]) == 0 and "run NAME" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0 and "FIELD=VALUE" in capfd.readouterr().out


@pytest.mark.once
def test_all_runs_every_experiment_goes_on_and_ends_with_the_worst_status(tmp_path, monkeypatch):
    asked = []

    def run(command, check):
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, 2 if "fashion" in command else 0)

    monkeypatch.setattr(training.subprocess, "run", run)
    assert main(["all", "--out", str(tmp_path)]) == 2  # such as where a data set is missing
    assert [command[1] for command in asked] == list(EXPERIMENTS)
    for _, name, *rest in asked:
        assert rest == ["--out", str(tmp_path / name), *([] if name == "explosion" else ["--resume"])]
    monkeypatch.setattr(training.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 143))
    asked.clear()
    assert main(["all"]) == 143 and asked == []  # who stops one run stops all
