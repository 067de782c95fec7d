"""Where things are kept that could be made again."""

from __future__ import annotations

from pathlib import Path

from cnnlib.cache import cache_folder, is_writable, private_folder


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
