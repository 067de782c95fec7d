"""Pictures, by what is drawn in them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cnnlib.cli.main import main
from cnnlib.demos import DEMOS
from cnnlib.demos.overlap import KERNEL, SLIDING, STANDING, draw_overlap
from cnnlib.demos.sliding import overlap
from cnnlib.report.style import pyplot_for_files

pytestmark = pytest.mark.once


@pytest.fixture
def pyplot():
    made, _ = pyplot_for_files()
    yield made
    made.close("all")


def test_the_result_is_drawn_as_far_as_the_function_has_slid(pyplot):
    count = 45
    animation = draw_overlap(count)
    animation._draw_was_started = True  # it is looked at frame by frame: matplotlib would warn
    above, below = animation._fig.axes
    for frame in (0, 20, count - 1):
        animation._func(frame)
        t = np.linspace(-1.5, 4.0, count)[frame]
        s, slid = above.lines[1].get_data()
        np.testing.assert_allclose(slid, SLIDING(t - s))
        drawn = np.array(below.lines[0].get_data())
        assert drawn.shape == (2, frame + 1)
        np.testing.assert_allclose(drawn[1, -1], overlap(STANDING, SLIDING, t), atol=1e-9)
        corners = above.collections[0].get_paths()[0].vertices
        shaded = (STANDING(s) * slid).sum() * (s[1] - s[0])
        assert corners[:, 1].max() == pytest.approx((STANDING(s) * slid).max())
        assert shaded == pytest.approx(drawn[1, -1], abs=0.02)
    assert below.get_ylabel() and below.get_xlabel() and len(above.get_legend().get_texts()) == 3


def test_a_lone_one_shows_the_kernel_and_its_mirror_image(pyplot):
    figure = DEMOS.get("flip").draw()
    heights = [[bar.get_height() for bar in panel.patches] for panel in figure.axes]
    (place,) = (at for at in range(4) if heights[0][at] == 1.0)
    assert heights[1][place : place + 3] == KERNEL.tolist() and heights[2][place : place + 3] == KERNEL[::-1].tolist()


def test_the_dirty_map_has_the_beam_s_shape_and_the_sources_brightness(pyplot):
    panels = [axes for axes in DEMOS.get("beam").draw().axes if axes.images]
    clean, telescope, dirty = (axes.images[0].get_array() for axes in panels)
    assert np.count_nonzero(clean) == 4 and telescope.max() == telescope[10, 10] == 1.0
    np.testing.assert_allclose(dirty[2:23, 0:21], telescope, atol=0.02)  # around the first source, of 1, at (12, 10)
    assert dirty.sum() == pytest.approx(clean.sum() * telescope.sum(), rel=0.05)  # but for what falls off the edge


@pytest.mark.parametrize("name", ["flip", "beam"])
def test_a_picture_is_written_and_explained(tmp_path, capsys, name):
    assert main(["demo", name, "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "written: " in said and len(said.splitlines()) >= 2
    with Image.open(tmp_path / "new" / DEMOS.get(name).file) as image:
        assert image.width > 500


def test_an_animation_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnlib.demos.overlap.draw_overlap", lambda: draw_overlap(4))
    assert main(["demo", "overlap", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "overlap.gif") as image:
        assert image.n_frames == 4


def test_a_window_is_opened_where_there_is_a_screen(tmp_path, capsys, monkeypatch, pyplot):
    opened = []
    monkeypatch.setattr(pyplot, "show", lambda: opened.append(len(pyplot.get_fignums())))
    monkeypatch.setattr("cnnlib.demos.demo.pyplot_for_windows", lambda: pyplot)
    assert main(["demo", "flip", "--out", str(tmp_path), "--show"]) == 0
    assert opened == [1] and "no window" not in capsys.readouterr().out
    assert main(["demo", "flip", "--out", str(tmp_path)]) == 0
    assert opened == [1]


def test_without_a_screen_the_picture_is_written_and_it_is_said(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name and name != "MPLBACKEND"}
    command = [sys.executable, "-m", "cnnlib", "demo", "flip", "--out", str(tmp_path), "--show"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "no window: matplotlib finds no screen" in done.stdout and done.stderr == ""
    assert (tmp_path / "flip.png").exists()


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, told in (
        (["demo", "nothing"], "no demo 'nothing'; there are: beam, "),
        (["demo", "flip", "--out", ""], "--out needs a folder"),
        (["demo", "flip", "--out", str(tmp_path / "file")], "cannot write to"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1


def test_the_list_has_the_pictures(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "overlap" in said and "The convolution of two functions" in said
