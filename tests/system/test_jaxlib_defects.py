"""Known defects of jaxlib: which versions get which flags, and that the programs which show them are right."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import jax
import pytest

from cnnlib.check.known_bad import PROGRAMS
from cnnlib.check.table import run_known_bad
from cnnlib.system import jaxlib_defects

AS_IT_WAS = {jaxlib_defects.NO_YNN_SUMS: "--xla_cpu_experimental_ynn_fusion_type=+reduce"}
"""For each flag, the value that leaves the defect in; for others it depends on chance or the processor."""


@pytest.mark.parametrize(
    ("jaxlib", "before", "after"),
    [
        ("0.7.2", "", jaxlib_defects.NO_XNNPACK),
        ("0.8.0.dev1", "--other=1", f"--other=1 {jaxlib_defects.NO_XNNPACK}"),
        ("0.8.0", "--xla_cpu_use_xnnpack=true", "--xla_cpu_use_xnnpack=true"),
        ("0.8.3", "", ""),
        ("0.10.1", "", ""),
        ("0.10.2", "", jaxlib_defects.NO_YNN_SUMS),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.11.0", "", jaxlib_defects.NO_YNN_SUMS),
        ("0.11.1", "", ""),
        ("0.12.0.1", "--other=1", "--other=1"),  # it no longer knows the first flag
    ],
)
def test_versions_with_a_defect_get_its_flag_and_others_none(jaxlib, before, after):
    assert jaxlib_defects.with_flags(jaxlib, before) == after


def test_flags_are_set_in_time_or_the_user_is_warned(monkeypatch):
    jax.devices()  # starts JAX
    monkeypatch.setattr(jaxlib_defects, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    with pytest.warns(UserWarning, match="JAX started before cnnlib was imported, and jaxlib 0.10.2 can"):
        jaxlib_defects.avoid()
    assert os.environ["XLA_FLAGS"] == f"--other=1 {jaxlib_defects.NO_YNN_SUMS}"
    monkeypatch.setattr(jaxlib_defects, "version", lambda name: "0.10.1")
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    jaxlib_defects.avoid()
    assert os.environ["XLA_FLAGS"] == "--other=1"


def test_every_defect_has_a_program_that_shows_it():
    assert {defect.name for defect in jaxlib_defects.DEFECTS} == set(PROGRAMS)


@pytest.mark.slow
@pytest.mark.usefixtures("compiling_well")
@pytest.mark.parametrize("name", PROGRAMS)
def test_known_bad_programs_are_right_with_cnnlib_imported(name):
    assert run_known_bad(name) == "right"


@pytest.mark.slow
@pytest.mark.usefixtures("compiling_well")
@pytest.mark.parametrize(
    "defect", [one for one in jaxlib_defects.DEFECTS if one.flag in AS_IT_WAS], ids=lambda one: one.name
)
def test_known_bad_programs_fail_without_the_flag(defect, monkeypatch):
    jaxlib = version("jaxlib")
    if defect not in jaxlib_defects.known(jaxlib):
        pytest.skip(f"jaxlib {jaxlib} does not have it")
    monkeypatch.setenv("XLA_FLAGS", AS_IT_WAS[defect.flag])
    assert run_known_bad(defect.name) != "right"


@pytest.mark.slow
@pytest.mark.usefixtures("compiling_well")
def test_the_run_that_crashed_trains(tmp_path):
    """Batch normalisation and local layers of seven axes: with jaxlib 0.10.2 as it is a segmentation fault."""
    overrides = ["arms=d_local_macs", "data.train=400", "epochs=1", "lanes.seed=0"]
    command = [sys.executable, "-m", "cnnlib", "run", "neyshabur", *overrides]
    done = subprocess.run([*command, "--out", str(tmp_path / "run"), "--wandb", "off"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
