"""What the README and the pages of the documentation say is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import cnnlib
from cnnlib.cli.main import COMMANDS, main, parser_for
from cnnlib.config.fields import from_dict
from cnnlib.config.overrides import override
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import EXPERIMENTS, Experiment, kept_like
from cnnlib.data.declaration import Data
from cnnlib.demos import DEMOS
from cnnlib.report import growth, summary
from cnnlib.runs.results import read_results

pytestmark = pytest.mark.once

ROOT = Path(cnnlib.__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md") if path.stem != "RESULTS"}
PUBLISHED = ("fc_vs_conv", "sharing_and_locality")
RESULTS = {name: read_results(ROOT / "docs" / name) for name in PUBLISHED}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_the_first_two_blocks_are_one_command_each():
    run, test, *rest = blocks("sh")
    assert rest == [] and README.index("```sh") < README.index("```\n")
    for command in (run, test):
        assert command.count("\n") == 1 and command.startswith("python3 -m venv .venv && ")
    assert run.rstrip().endswith(".venv/bin/cnnlib run fc_vs_conv")
    assert "'.[test]'" in test and "-m pytest" in test


def commands():
    """Every command of the documentation that can be typed as it stands."""
    text = "\n".join((README, *PAGES.values()))
    found = re.findall(rf"(?:^|`|Command: |-16 .*?)cnnlib ((?:{'|'.join(COMMANDS)})\b[^#`\n]*)", text, re.MULTILINE)
    return [one for one in dict.fromkeys(found) if "..." not in one and "NAME" not in one and "DIR" not in one]


@pytest.mark.parametrize("command", commands())
def test_every_command_names_what_exists(command):
    verb, *arguments = shlex.split(command)
    assert verb in COMMANDS
    if verb == "count":
        assert main(["count", *arguments]) == 0
    elif verb == "demo":
        assert parser_for(verb).parse_intermixed_args(arguments).name in DEMOS
    elif verb in ("runs", "check", "compare", "report", "results", "all", "wandb", "merge"):
        parser_for(verb).parse_intermixed_args(arguments)
    elif verb != "list" and arguments[0] != "strides":  # the experiment that the README adds
        options = parser_for(verb).parse_intermixed_args(arguments)
        override(EXPERIMENTS.get(options.name), options.overrides)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_is_that_of_the_stored_results(name):
    text = README + PAGES["models"]
    (table,) = re.findall(rf"<!-- table: {name} -->\n(.*?)<!-- end of table -->", text, re.DOTALL)
    assert table == summary.markdown(RESULTS[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_stored_results_are_those_of_the_registered_experiment(name):
    registered = EXPERIMENTS.get(name)
    assert kept_like(from_dict(RESULTS[name].config, Experiment), registered) == registered
    assert (ROOT / "docs" / name / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_stored_explosion_is_that_of_the_registered_one():
    folder = ROOT / "docs" / "explosion"
    experiment = EXPERIMENTS.get("explosion")
    assert (folder / "table.md").read_text() == growth.markdown(growth.counted(experiment, "explosion"))
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_counts_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    both = r"```\n(cnnlib count lenet5[^\n]*)\n.*?```\n\n```\n(.*?)```"
    command, output = re.findall(both, PAGES["models"], re.DOTALL)[0]
    assert main(shlex.split(command)[1:]) == 0
    assert output.split("\n") == [line.rstrip() for line in capsys.readouterr().out.rstrip().split("\n")] + [""]


def test_what_the_readme_concludes_follows_from_the_stored_results():
    arms = {arm.name: arm for arm in RESULTS["fc_vs_conv"].arms}
    lenet5, full, matched = arms["lenet5"], arms["lenet_300_100"], arms["mlp_75_33"]
    assert lenet5.test_accuracy.mean - full.test_accuracy.mean >= 0.02
    assert lenet5.test_accuracy.ci95[0] > full.test_accuracy.ci95[1]
    assert lenet5.test_accuracy.ci95[0] > matched.test_accuracy.ci95[1]
    assert round(lenet5.parameters / full.parameters, 2) == 0.23
    assert lenet5.macs > full.macs > matched.macs
    assert lenet5.train_seconds_per_lane > full.train_seconds_per_lane


def test_what_the_readme_concludes_of_sharing_and_locality_follows_too():
    arms = {arm.name: arm for arm in RESULTS["sharing_and_locality"].arms}
    accuracy = {name: arm.test_accuracy for name, arm in arms.items()}
    by_reading = {
        reading: [accuracy[name] for name, arm in arms.items() if arm.connectivity == reading]
        for reading in ("conv", "local", "full")
    }
    assert max(a.ci95[1] for a in by_reading["full"]) < min(a.ci95[0] for a in by_reading["local"])
    assert max(a.mean for a in by_reading["local"]) < min(a.mean for a in by_reading["conv"])
    pairs = [("conv", "local"), ("conv_parameters", "local_parameters"), ("conv_macs", "local_macs")]
    gaps = [100 * (accuracy[conv].mean - accuracy[local].mean) for conv, local in pairs]
    assert [round(min(gaps), 1), round(max(gaps), 1)] == [0.8, 1.1]
    assert sum(accuracy[conv].ci95[0] < accuracy[local].ci95[1] for conv, local in pairs) == 2
    means = [[100 * a.mean for a in by_reading[reading]] for reading in ("conv", "local", "full")]
    span = r"([\d.]+) to ([\d.]+) %"
    text = " ".join(PAGES["models"].split())
    said = re.search(rf"Convolutions reach {span}, local nets {span}, full nets {span}", text).groups()
    assert [float(number) for number in said] == [round(end, 1) for each in means for end in (min(each), max(each))]
    assert all((lane.distance_from_conv or 1.0) > 0.99 for arm in arms.values() for lane in arm.lanes)


def test_the_example_experiment_works_and_has_at_most_15_lines(monkeypatch):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 15
    monkeypatch.setattr(EXPERIMENTS, "_declarations", {})
    names: dict[str, object] = {}
    exec(compile(code, "strides.py", "exec"), names)
    experiment = EXPERIMENTS.get("strides")
    assert isinstance(experiment, Experiment)
    pooled, strided = resolve(experiment)
    assert pooled.count.parameters == 61_706 and strided.model.connectivity == "conv"


def test_the_example_that_reads_results_prints_those_of_the_run(tmp_path, monkeypatch, capsys):
    _, code = blocks("python", PAGES["guide"])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "fc_vs_conv").symlink_to(ROOT / "docs" / "fc_vs_conv")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "read.py", "exec"), {})
    assert capsys.readouterr().out.startswith("lenet_300_100 266610 0.94")


def test_the_example_of_a_sweep_makes_the_arms_that_it_shows():
    code, _ = blocks("python", PAGES["guide"])
    names: dict[str, object] = {}
    exec(compile(code, "sweep.py", "exec"), names)
    arms = Experiment(names["arms"], Data("mnist5k")).arms
    assert [arm.name for arm in arms] == [
        *(f"conv_{size}" for size in (100, 400, 1600)),
        *(f"local_{size}" for size in (100, 400, 1600)),
        *(f"full_{size}" for size in (400, 1600)),
    ]
    assert arms[1].own == ("data.train=400",)


@pytest.mark.slow
def test_the_example_of_readings_runs_and_says_what_it_says(capsys, monkeypatch):
    (code,) = blocks("python", PAGES["models"])
    # A reader's JAX promotes ranks; the test session's does not.
    names: dict[str, object] = {}
    exec(compile(code, "readings.py", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["conv 61706 416520", "local 423038 416520", "full 5634974 5628456"]
    assert lines[3] == "63,895 parameters for 61,706 (+3.5 %), widths x 0.189"
    assert names["total"] == 0


def test_the_example_of_own_images_makes_a_set_that_the_command_below_it_trains_on(tmp_path, monkeypatch):
    (code,) = blocks("python", PAGES["data"])
    (command,) = (command for command in commands() if "data.name=my_images" in command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for index in range(400):
            Image.new("RGB", (40, 30), (index % 256, 100 * label, 0)).save(tmp_path / f"my_images/{name}/{index}.png")
    exec(compile(code, "own_images.py", "exec"), {})
    options = parser_for("run").parse_intermixed_args(shlex.split(command)[1:])
    arms = resolve(override(EXPERIMENTS.get(options.name), options.overrides))
    assert arms[0].input_shape == (32, 32, 3) and arms[0].description.counts["test"] == 160
    assert arms[0].description.class_names == ("cat", "dog")


def test_the_table_of_pictures_names_every_demo():
    section = README.split("## Pictures and notebooks")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "`" in line]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(iter(DEMOS))
    words = ("Sixteen", len(list(DEMOS))), ("Nine", len(list((ROOT / "notebooks").glob("*.ipynb"))))
    assert all(word in section for word, _ in words) and [count for _, count in words] == [16, 9]
