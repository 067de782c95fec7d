"""A file imports only from lower floors; files of one floor do not import each other."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest

import cnnlib
import experiments

pytestmark = pytest.mark.once

FLOORS = [
    {"defects", "errors", "cache", "style", "tables", "watcher", "stopping", "machine"},
    {"overlap", "multihost", "known_bad", "geometry", "aot.hlo", "aot.schedule", "aot.hardware"},
    {"spec", "registry", "kernels"},
    {"architectures", "cost", "lowerings", "windows"},
    {"primitives"},
    {"budget", "ops", "fields", "aot.compiling"},
    {"config"},
    {"sweep", "sources"},
    {"stream", "prepared"},
    {"experiments.*", "data", "augment", "models", "optim", "stats"},
    {"equivalence", "fits", "own_data"},
    {"resolve", "train", "tracking", "counting"},
    {"check", "folder", "report", "terminal", "demo", "plan", "evaluation", "comparisons"},
    {"checkpoint", "predictions"},
    {"mesh", "wandb_copy", "tensorboard"},
    {"programs"},
    {"aot.arms", "backend", "check_table", "resume", "feeds", "growth", "overview", "charts", "mistakes"},
    {"arms"},
    {"launch.merge", "launch.supervise"},
    {"run", "results_page", "page"},
    {"trained", "launch.jobs", "launch.local", "launch.slurm", "launch.ray_core"},
    {"launch.start"},
    {"abstraction"},
    {"demos.*"},
    {"experiments.__main__"},
]
WITHOUT_JAX = {
    "defects",
    "errors",
    "cache",
    "spec",
    "registry",
    "architectures",
    "cost",
    "budget",
    "config",
    "fields",
    "experiments.*",
    "data",
    "sources",
    "prepared",
    "stream",
    "own_data",
    "resolve",
    "tracking",
    "folder",
    "watcher",
    "stopping",
    "wandb_copy",
    "tensorboard",
    "overview",
    "counting",
    "growth",
    "plan",
    "predictions",
    "comparisons",
    "results_page",
    "charts",
    "page",
    "overlap",
    "demo",
    "demos.*",
    "windows",
    "mistakes",
    "style",
    "tables",
    "stats",
    "fits",
    "launch.jobs",
    "launch.local",
    "launch.slurm",
    "launch.supervise",
    "machine",
}


def files():
    for path in Path(cnnlib.__file__).parent.glob("*.py"):
        if path.stem != "__init__":
            yield path.stem, path
    for package in ("aot", "launch"):
        for path in Path(cnnlib.__file__).parent.glob(f"{package}/*.py"):
            if path.stem != "__init__":
                yield f"{package}.{path.stem}", path
    for path in Path(cnnlib.__file__).parent.glob("demos/*.py"):
        yield "demos.*", path
    for path in Path(experiments.__file__).parent.glob("*.py"):
        if path.stem != "__init__":
            yield ("experiments.__main__" if path.stem == "__main__" else "experiments.*"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            is_package = node.module in ("cnnlib", "cnnlib.aot", "cnnlib.launch")
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(name):
    (floor,) = (number for number, names in enumerate(FLOORS) if name in names)
    return floor


def test_every_file_has_a_floor_and_imports_from_lower_ones():
    names = {name for name, _ in files()}
    assert names == set().union(*FLOORS)
    for name, path in files():
        for module in imports(path):
            if module.startswith("cnnlib."):
                imported = re.sub(r"^demos\b.*", "demos.*", module.removeprefix("cnnlib."))
                assert floor_of(imported) < floor_of(name), f"{name} imports {imported}: not below it"


def test_declarations_and_counts_do_without_jax():
    for name, path in files():
        if name in WITHOUT_JAX:
            heavy = {module.split(".")[0] for module in imports(path)} & {"jax", "flax", "optax"}
            assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize(
    ("library", "knows"),
    [
        ("flax", "models"),
        ("orbax", "checkpoint"),
        ("wandb", "wandb_copy"),
        ("tensorboardX", "tensorboard"),
        ("ray", "launch.ray_core"),
        ("grain", "stream"),
    ],
)
def test_only_one_file_knows(library, knows):
    assert {name for name, path in files() if any(m.split(".")[0] == library for m in imports(path))} == {knows}


def test_shapes_are_checked_in_every_file_that_writes_them_in_signatures():
    root = Path(cnnlib.__file__).parent
    writing = {path.stem for path in root.glob("*.py") if "from jaxtyping import" in path.read_text()}
    configuration = configparser.ConfigParser()
    configuration.read(root.parent / "setup.cfg")
    (checked,) = re.findall(r"--jaxtyping-packages=(\S+)", configuration["tool:pytest"]["addopts"])
    assert checked.split(",") == [*(f"cnnlib.{name}" for name in sorted(writing)), "beartype.beartype"]
