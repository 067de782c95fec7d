"""Cores and memory that control groups leave, in a hierarchy of files like the kernel's."""

from __future__ import annotations

import os

import pytest

from cnnlib.system import machine
from cnnlib.system.machine import cores_here, free_memory

MIB = 2**20
V2 = {"own": "0::/batch/job_7/step_0\n", "files": ("memory.max", "memory.current", "inactive_file")}
V1 = {
    "own": "4:memory:/batch/job_7/step_0\n1:cpu,cpuacct:/batch/job_7/step_0\n",
    "files": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.fixture(autouse=True)
def large(monkeypatch, tmp_path):
    """A machine of 64 cores in no control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_there_is_what_the_machine_has(tmp_path):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cores_here() == 64 and 0 < free_memory() < total
    written(tmp_path / "own", V2["own"])  # of which nothing is seen
    assert cores_here() == 64 and 0 < free_memory() < total
    written(tmp_path / "groups" / "batch" / "cpu.max", "max 100000\n")
    written(tmp_path / "groups" / "batch" / "memory.max", "max\n")
    assert cores_here() == 64 and 0 < free_memory() < total


@pytest.mark.parametrize("group", ["batch/job_7/step_0", "batch/job_7", "."])
@pytest.mark.parametrize("version", [V2, V1], ids=["v2", "v1"])
def test_the_least_of_the_groups_around_a_process_counts(group, version, tmp_path):
    written(tmp_path / "own", version["own"])
    limit, used, cached = version["files"]
    memory = tmp_path / "groups" / ("" if version is V2 else "memory") / group
    written(memory / limit, f"{300 * MIB}\n")
    written(memory / used, f"{250 * MIB}\n")
    written(memory / "memory.stat", f"{cached} {100 * MIB}\nanon 5\n")
    assert free_memory() == 150 * MIB
    (memory / "memory.stat").unlink()
    assert free_memory() == 50 * MIB
    written(memory / limit, f"{100 * MIB}\n")  # lowered below what is used
    assert free_memory() == 0


@pytest.mark.parametrize(("share", "cores"), [("200000", 2), ("150000", 2), ("50000", 1), ("9900000", 64)])
def test_a_share_of_the_time_is_so_many_cores(share, cores, tmp_path):
    written(tmp_path / "own", V2["own"])
    written(tmp_path / "groups" / "batch" / "job_7" / "cpu.max", f"{share} 100000\n")
    assert cores_here() == cores


def test_a_share_of_the_time_in_groups_of_version_1(tmp_path):
    written(tmp_path / "own", V1["own"])
    group = tmp_path / "groups" / "cpu" / "batch"
    written(group / "cpu.cfs_period_us", "100000\n")
    written(group / "cpu.cfs_quota_us", "-1\n")
    assert cores_here() == 64
    written(group / "cpu.cfs_quota_us", "400000\n")
    assert cores_here() == 4
