"""A run's record says which code decided its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

import cnnlib
from cnnlib.system import provenance

pytestmark = pytest.mark.once

DECIDING = ("train/step.py", "ops/lowerings/correlations.py", "ops/kernels.cc", "stats/intervals.py", "runs/arms.py")
OTHERS = ("report/page.py", "report/page.html", "cli/main.py", "tracking/wandb_copy.py", "ops/note.txt")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with some of cnnlib's files, in place of cnnlib."""
    for name in (*DECIDING, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(cnnlib, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path


@pytest.mark.parametrize("name", DECIDING)
def test_code_that_decides_numbers_changes_the_hash(name, package):
    before = provenance.code_sha256()
    (package / name).write_text("after")
    edited = provenance.code_sha256()
    (package / name).rename((package / name).with_stem("other"))
    assert len({before, edited, provenance.code_sha256()}) == 3


@pytest.mark.parametrize("name", OTHERS)
def test_other_code_does_not(name, package):
    before = provenance.code_sha256()
    (package / name).write_text("after")
    assert provenance.code_sha256() == before


def test_the_packages_that_decide_exist():
    assert all((Path(cnnlib.__file__).parent / name).is_dir() for name in provenance.DECIDING)
