"""The house: packages import downwards, files and functions are small, one file knows each library."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest

import cnnlib
from cnnlib import experiments

pytestmark = pytest.mark.once

ROOT = Path(cnnlib.__file__).parent
ORDER = (
    "system",
    "spec stats data ops",
    "config",
    "aot",
    "nn",
    "train",
    "check",
    "runs",
    "launch report",
    "tracking",
    "interpret",
    "demos",
    "cli",
)
"""Packages from the bottom up. Those of one line do not import each other, but for `ALLOWED`: shapes and windows
are those of `spec`, and a worker of Ray runs the command itself."""
ALLOWED = {("data", "spec"), ("ops", "spec"), ("stats", "spec"), ("launch", "cli")}
WITHOUT_JAX = {"system", "spec", "config", "stats", "data", "report", "tracking", "launch"}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax"}


def imports(path):
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}


def test_packages_import_downwards():
    floors = {package: floor for floor, packages in enumerate(ORDER) for package in packages.split()}
    assert set(floors) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name, path in FILES.items():
        package = name.partition(".")[0]
        if package not in floors:  # what stands beside the packages
            continue
        imported = {m.split(".")[1] for m in imports(path) if re.match(r"cnnlib\.\w", m)} & set(floors) - {package}
        wrong = {other for other in imported if floors[other] >= floors[package] and (package, other) not in ALLOWED}
        assert not wrong, f"{name} imports {wrong}"


def test_declarations_counts_and_reports_do_without_jax():
    declared = {f"experiments.{path.stem}": path for path in Path(experiments.__file__).parent.glob("[!_]*.py")}
    for name, path in {**FILES, **declared}.items():
        if name.partition(".")[0] in WITHOUT_JAX | {"experiments"}:
            heavy = {module.split(".")[0] for module in imports(path)} & HEAVY
            assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize(
    ("library", "knows"),
    [
        ("flax", "nn.network"),
        ("orbax", "train.checkpoint"),
        ("wandb", "tracking.wandb_copy"),
        ("tensorboardX", "tracking.tensorboard"),
        ("ray", "launch.ray_core"),
        ("grain", "data.stream"),
    ],
)
def test_only_one_file_knows(library, knows):
    assert {name for name, path in FILES.items() if any(m.split(".")[0] == library for m in imports(path))} == {knows}


def test_shapes_are_checked_in_every_file_that_writes_them_in_signatures():
    imports = {name: re.search("^from jaxtyping import (.*)$", path.read_text(), re.M) for name, path in FILES.items()}
    writing = {name for name, found in imports.items() if found and set(found[1].split(", ")) - {"PyTree"}}
    configuration = configparser.ConfigParser()
    configuration.read(ROOT.parent / "setup.cfg")
    (checked,) = re.findall(r"--jaxtyping-packages=(\S+)", configuration["tool:pytest"]["addopts"])
    assert checked.split(",") == [*(f"cnnlib.{name}" for name in sorted(writing)), "beartype.beartype"]


FOLDERS = ("cnnlib", "experiments", "benchmarks", "tests")
PYTHON = [path for folder in FOLDERS for path in (ROOT.parent / folder).rglob("*.py")]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (250 if path.name == "step.py" and path.is_relative_to(ROOT) else 450)
    for node in ast.walk(ast.parse(text)) if path.is_relative_to(ROOT) else ():
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < 60 and len(arguments) <= 8, node.name


def test_every_package_is_installed():
    configuration = configparser.ConfigParser()
    configuration.read(ROOT.parent / "setup.cfg")
    packages = configuration["options"]["packages"].split()
    found = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")}
    assert set(packages) == found | {"cnnlib.experiments"}
    assert sorted(path.name for path in ROOT.iterdir() if path.is_file()) == [
        "__init__.py",
        "__main__.py",
        "errors.py",
        "py.typed",
    ]
