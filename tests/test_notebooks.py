"""Notebooks: one text in two forms, thin, ready for Colab; the slow tests execute each with small parameters."""

from __future__ import annotations

import ast
import configparser
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

import cnnlib

ROOT = Path(cnnlib.__file__).parents[1]
FOLDER = ROOT / "notebooks"
SMALL = {
    "overlap": {"places": 6},
    "filters": {},
    "padding_and_pooling": {"digits": 20},
    "explosion": {"sides": [8, 32, 1000]},
    "abstraction": {"seeds": 2, "epochs": 4},
    "full_vs_conv": {"seeds": 2, "epochs": 2},
    "ablation_on_tpu": {"seeds": 3, "sizes": [3, 5], "epochs": 2},
    "plan_for_tpu": {"seeds": 8, "sizes": [1]},
    "your_own_data": {"seeds": 2, "epochs": 2},
}
"""Parameters with which each is executed here: less of the same."""
SECONDS = 120
"""In which each is done: of two cores, so that of the processor it takes at most twice as many."""
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def source(name):
    return jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")


def code(name):
    return [cell for cell in source(name).cells if cell.cell_type == "code"]


def test_every_notebook_is_executed_here():
    assert sorted(SMALL) == NAMES == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_say_the_same_and_hold_no_output(name):
    kept = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(kept)
    cells = [
        [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]
        for notebook in (source(name), kept)
    ]
    assert cells[0] == cells[1], f"jupytext --update --to ipynb notebooks/{name}.py"
    for cell in kept.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_colab_and_begins_like_the_others(name):
    configuration = configparser.ConfigParser()
    configuration.read(ROOT / "setup.cfg")
    home = configuration["metadata"]["url"].removeprefix("https://github.com/")
    first = source(name).cells[0].source
    (badge,) = re.findall(r"\]\((https://colab\.research\.google\.com/github/[^)]+)\)", first)
    assert badge == f"https://colab.research.google.com/github/{home}/blob/main/notebooks/{name}.ipynb"
    assert first.startswith("# ")
    install, parameters, devices, *_ = code(name)
    assert install.source == code("overlap")[0].source and f"git+https://github.com/{home}" in install.source
    assert parameters.metadata["tags"] == ["parameters"]
    assert "use_cores()" in devices.source and "print(jax.devices())" in devices.source


@pytest.mark.parametrize("name", NAMES)
def test_it_has_its_parameters_and_defines_nothing_else(name):
    """What is worth a name is worth a test, so it is in the library."""
    _, parameters, *_ = code(name)
    declared = {
        target.id
        for line in ast.parse(parameters.source).body
        if isinstance(line, ast.Assign)
        for target in line.targets
    }
    assert set(SMALL[name]) <= declared
    for cell in code(name):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), cell.source


def test_installing_leaves_the_jax_that_is_there():
    """Of what Colab has, nothing that its TPU needs is exchanged: the very versions are asked for."""
    (install, *_) = code("overlap")
    assert '("jax", "jaxlib", "numpy")' in install.source and "-U" not in install.source
    assert 'find_spec("cnnlib") is None' in install.source


def executed(name, folder, **environment):
    """The cells of a notebook after papermill has run it in a folder, and the processor's time that it took."""
    arguments = [part for key, value in SMALL[name].items() for part in ("-y", f"{{{key}: {value}}}")]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--execution-timeout", "600"]
    out = folder / f"{name}.ipynb"
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run(
        [*command, *arguments, str(FOLDER / f"{name}.ipynb"), str(out)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(out, as_version=4).cells, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def outputs(cells):
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(cells):
    return [output for output in outputs(cells) if "image/png" in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.usefixtures("compiling_well")
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_time_without_a_warning_and_shows_pictures(name, tmp_path):
    cells, seconds = executed(name, tmp_path)
    assert seconds < 2 * SECONDS
    assert [output.text for output in outputs(cells) if output.get("name") == "stderr"] == []
    assert len(pictures(cells)) >= 1
    assert "CpuDevice" in "".join(output.text for output in outputs(cells) if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_ablation_runs_on_eight_devices_as_it_is(tmp_path):
    cells, _ = executed("ablation_on_tpu", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    said = "".join(output.text for output in outputs(cells) if output.get("name") == "stdout")
    assert "CpuDevice(id=7)" in said
    assert "6 lanes of each arm on 6 x cpu: 1 each" in said  # 3 seeds by 2 learning rates
