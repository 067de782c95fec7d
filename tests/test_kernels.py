"""Which kernels the CPU runs, and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cnnlib import kernels
from cnnlib.errors import UserError

needs_compiler = pytest.mark.skipif(bool(kernels.register()), reason="kernels.cc cannot be compiled here")


def chosen_in_a_process(**environment):
    code = "from cnnlib import kernels; print(kernels.is_compiled(), kernels.chosen(), kernels.register())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return result.stdout.split(maxsplit=2)


@needs_compiler
def test_kernels_are_compiled_once_a_machine(tmp_path):
    assert chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path))[:2] == ["False", "native"]
    (library,) = (tmp_path / "cnnlib" / "kernels").iterdir()  # and nothing unfinished beside it
    written = library.stat().st_mtime_ns
    assert chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path))[:2] == ["True", "native"]
    assert library.stat().st_mtime_ns == written


def test_a_machine_without_a_compiler_falls_back_and_says_why(tmp_path):
    _, choice, reason = chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert choice == "xla"
    assert reason.strip() == "there is no C++ compiler (no-such-compiler)"


def test_a_compiler_that_fails_is_named_and_leaves_nothing(tmp_path):
    _, choice, reason = chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path), CXX="false")
    assert choice == "xla"
    assert reason.startswith("false does not compile kernels.cc")
    assert not list((tmp_path / "cnnlib" / "kernels").iterdir())


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    assert chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path / "file"))[1] == "native"


def test_the_choice_can_be_made_by_hand(monkeypatch):
    monkeypatch.setenv("CNNLIB_KERNELS", "xla")
    assert kernels.chosen() == "xla"
    monkeypatch.setenv("CNNLIB_KERNELS", "fast")
    with pytest.raises(UserError, match="expected auto, native or xla"):
        kernels.chosen()
    monkeypatch.setenv("CNNLIB_KERNELS", "native")
    monkeypatch.setattr(kernels, "register", lambda: "there is no C++ compiler (c++)")
    with pytest.raises(UserError, match="CNNLIB_KERNELS=native: there is no C\\+\\+ compiler"):
        kernels.chosen()
