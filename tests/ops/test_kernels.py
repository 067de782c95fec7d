"""Which kernels the CPU runs, and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cnnlib.errors import UserError
from cnnlib.ops import kernels

needs_compiler = pytest.mark.skipif(bool(kernels.register()), reason="kernels.cc cannot be compiled here")


def chosen_in_a_process(**environment):
    code = "from cnnlib.ops import kernels; print(kernels.is_compiled(), kernels.chosen(), kernels.register())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return result.stdout.split(maxsplit=2)


@pytest.fixture
def hasty(tmp_path_factory):
    """A compiler that does not optimise, which takes a third of the time."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(kernels.compiler())} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@needs_compiler
def test_kernels_are_compiled_once_a_machine(tmp_path, hasty):
    place = {"XDG_CACHE_HOME": str(tmp_path), "CXX": hasty}
    assert chosen_in_a_process(**place)[:2] == ["False", "native"]
    folder = tmp_path / "cnnlib" / "kernels"
    assert sorted(path.suffix for path in folder.iterdir()) == [".sha256", ".so"]  # and nothing unfinished beside them
    (library,) = folder.glob("*.so")
    written = library.stat().st_mtime_ns
    assert chosen_in_a_process(**place)[:2] == ["True", "native"]
    assert library.stat().st_mtime_ns == written
    content = library.read_bytes()
    library.write_bytes(content[:30_000])  # a copy that was cut short: to load it would end the process
    assert chosen_in_a_process(**place)[:2] == ["False", "native"]
    assert len(library.read_bytes()) == len(content)


def test_kernels_are_compiled_for_the_processor_at_hand():
    assert "-march=native" in kernels.flags("x86_64") and "-mcpu=native" not in kernels.flags("x86_64")
    for machine in ("aarch64", "arm64"):
        assert "-mcpu=native" in kernels.flags(machine) and "-march=native" not in kernels.flags(machine)


def test_a_machine_without_a_compiler_falls_back_and_says_why(tmp_path):
    _, choice, reason = chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert choice == "xla"
    assert reason.strip() == "there is no C++ compiler (no-such-compiler)"


@pytest.fixture
def chosen_with(tmp_path, monkeypatch):
    """Return the kernels that a new process would choose with another compiler and nothing compiled, and the reason."""

    def choose(compiler):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setattr(kernels, "register", kernels.register.__wrapped__)
        return kernels.chosen(), kernels.register()

    return choose


def test_a_compiler_that_fails_is_named_and_leaves_nothing(chosen_with, tmp_path):
    choice, reason = chosen_with("false")
    assert choice == "xla"
    assert reason.startswith("false does not compile kernels.cc")
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("true", "the compiled kernels cannot be loaded"),
        ('c++ "', 'CXX=c++ " is no command: No closing quotation'),
        ("", "there is no C++ compiler (CXX is empty)"),
        ("{folder}/broken", "the C++ compiler {folder}/broken does not start: No such file or directory"),
    ],
)
def test_a_compiler_that_is_none_is_a_reason_too(command, reason, chosen_with, tmp_path):
    (tmp_path / "broken").write_text("#!/no/such/interpreter\n")
    (tmp_path / "broken").chmod(0o755)
    command, reason = (text.replace("{folder}", str(tmp_path)) for text in (command, reason))
    choice, told = chosen_with(command)
    assert choice == "xla" and told.startswith(reason)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@needs_compiler
def test_a_cache_folder_that_cannot_be_written_does_not_matter(tmp_path, hasty):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    found = chosen_in_a_process(XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path / "tmp"), CXX=hasty)
    assert found[1] == "native" and not list((tmp_path / "tmp").iterdir())


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A library where the kernels are looked for, with its hash, that leaves the file `ran` when it is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = tmp_path / "ran"
    code = f'#include <cstdio>\n__attribute__((constructor)) void run() {{ fclose(fopen("{ran}", "w")); }}\n'
    code += "".join(f'extern "C" void {target}() {{}}\n' for target in kernels.TARGETS)
    (tmp_path / "planted.cc").write_text(code)
    subprocess.run([*kernels.compiler(), "-shared", "-fPIC", "planted.cc", "-o", "planted"], cwd=tmp_path, check=True)
    monkeypatch.setenv("CXX", "false")  # is asked in vain where the planted library is not taken
    path = kernels.library_path(["false"])
    kernels.keep(tmp_path / "planted", path)
    assert path.exists()
    return SimpleNamespace(path=path, ran=ran)


@needs_compiler
@pytest.mark.parametrize("level", range(5))
def test_a_library_that_others_could_have_put_there_is_not_loaded(planted, level):
    place = (planted.path, *planted.path.parents)[level]  # up to what holds the cache
    place.chmod(0o777)
    with pytest.raises(kernels.Unavailable, match="does not compile"):
        kernels.library()
    assert not planted.ran.exists() and not kernels.is_compiled()
    assert (kernels.not_kept() is None) == (level == 0)


@needs_compiler
def test_a_library_of_a_folder_of_the_user_s_own_is_loaded(planted):
    assert kernels.is_compiled() and kernels.not_kept() is None
    kernels.library()
    assert planted.ran.exists()


@needs_compiler
def test_a_library_is_not_kept_where_others_can_write(planted):
    planted.path.unlink()
    planted.path.parent.chmod(0o777)
    kernels.keep(planted.path.with_suffix(".sha256"), planted.path)
    assert not planted.path.exists()


def test_the_choice_can_be_made_by_hand(monkeypatch):
    monkeypatch.setenv("CNNLIB_KERNELS", "xla")
    assert kernels.chosen() == "xla"
    monkeypatch.setenv("CNNLIB_KERNELS", "fast")
    with pytest.raises(UserError, match="expected auto or one of native, xla, gpu, tpu"):
        kernels.chosen()
    monkeypatch.setenv("CNNLIB_KERNELS", "native")
    monkeypatch.setattr(kernels, "register", lambda: "there is no C++ compiler (c++)")
    with pytest.raises(UserError, match="CNNLIB_KERNELS=native: there is no C\\+\\+ compiler"):
        kernels.chosen()
