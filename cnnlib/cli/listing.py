"""`cnnlib list`: list experiments and demos. This module parses the files, without importing them."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path


def add_list(_: argparse.ArgumentParser) -> None:
    """Declare no arguments: `list` has none."""


def command_list(_: argparse.Namespace) -> int:
    """Print each experiment with its question and each demo with its title."""
    experiments = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in _files("cnnlib.experiments")}
    questions = {name: _first_line(tree) for name, tree in experiments.items()}
    demos = {
        node.name: _first_line(node)
        for path in _files("cnnlib.demos")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and any("DEMOS" in ast.dump(mark) for mark in node.decorator_list)
    }
    width = max(map(len, questions))
    for name, question in sorted(questions.items()):
        print(f"{name:<{width}}  {question}")
    print("\npictures, `cnnlib demo NAME`:\n")
    for name, title in sorted(demos.items()):
        print(f"{name:<{width}}  {title}")
    return 0


def _files(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations is not None
    return sorted(path for place in found.submodule_search_locations for path in Path(place).glob("[!_]*.py"))


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
