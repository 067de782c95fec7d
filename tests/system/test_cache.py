"""Where things are kept that could be made again."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path

import jax
import pytest

from cnnlib.system.cache import cache_folder, is_writable, private_folder, refusal
from cnnlib.train import programs


def test_the_cache_folder_is_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("data") == tmp_path / "xdg" / "cnnlib" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("data") == tmp_path / "home" / ".cache" / "cnnlib" / "data"


def test_a_user_without_a_home_has_a_private_folder(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder("kernels")
    assert folder == cache_folder("kernels") and folder.is_relative_to(tmp_path) and is_writable(folder)
    assert folder.parent.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    wanted.chmod(0o777)
    assert private_folder(wanted) != wanted
    wanted.chmod(0o700)
    assert private_folder(wanted) == wanted
    link = tmp_path / "link"
    link.symlink_to(wanted)
    assert private_folder(link) != link


def test_a_file_is_no_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert not is_writable(tmp_path / "file") and not is_writable(tmp_path / "file" / "inside")
    assert is_writable(tmp_path / "new" / "folder")


@pytest.fixture(params=[0o000, 0o022])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_folders_of_the_cache_are_the_user_s_alone_whatever_the_umask(tmp_path, umask):
    folder = tmp_path / "new" / "cnnlib" / "kernels"
    assert is_writable(folder)
    assert [place.stat().st_mode & 0o777 for place in (folder, *folder.parents[:2])] == [0o700] * 3
    assert refusal(folder) is None


def give_away(folder, monkeypatch):
    """Makes a folder somebody else's: truly where this user may, else it is this user who is another one."""
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


def members_of_the_group(monkeypatch, *others):
    """Makes this user's group a private one, named as the user, with these other members."""
    user = pwd.getpwuid(os.getuid())
    known = grp.struct_group((user.pw_name, "x", user.pw_gid, [user.pw_name, *others]))
    monkeypatch.setattr(grp, "getgrgid", lambda group: known)


def test_a_user_s_private_group_may_write(tmp_path, monkeypatch):
    """As folders are made with the umask 002 that Debian and Fedora give their users."""
    tmp_path.chmod(0o770)
    members_of_the_group(monkeypatch)
    assert refusal(tmp_path) is None
    members_of_the_group(monkeypatch, "somebody")
    assert refusal(tmp_path) is not None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777, None])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_code_is_not_taken_from_a_folder_that_others_can_change(mode, level, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    folder = cache_folder("kernels")
    assert is_writable(folder)
    place = (folder, *folder.parents)[level]
    if mode is None:
        give_away(place, monkeypatch)
        place = place if os.geteuid() == 0 else folder
    else:
        place.chmod(mode)
    members_of_the_group(monkeypatch, "somebody")
    if mode == 0o1777 and level:  # as /tmp
        assert refusal(folder) is None
        return
    told = refusal(folder)
    assert told == f"{place} can be changed by others (XDG_CACHE_HOME names another folder)"


def test_a_link_is_followed_before_it_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    folder = cache_folder("kernels")
    assert folder.is_relative_to(tmp_path / "target") and refusal(folder) is None
    # One that has come since leads where somebody else wants.
    folder.rmdir()
    (tmp_path / "kernels").mkdir()
    folder.symlink_to(tmp_path / "kernels")
    assert refusal(folder).startswith(f"{folder} can be changed by others")


def test_compiled_programs_are_neither_loaded_nor_kept_where_others_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    tmp_path.chmod(0o777)
    told = []
    with programs.compile_cache(True, told.append):
        assert jax.config.jax_compilation_cache_dir is None
    assert told == [f"{refusal(tmp_path)}: compiled programs are not kept"]
    tmp_path.chmod(0o700)
    with programs.compile_cache(True, told.append):
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path))
    assert len(told) == 1
