"""Runs of two processes that train together, on this machine: `cnnlib run NAME --distributed`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

RUN = [sys.executable, "-m", "cnnlib", "run", "fc_vs_conv", "arms=mlp_75_33,lenet5", "--wandb", "off"]
SMALL = [
    "arms.lenet5.model=conv:4@3 relu max:2 dense:classes",
    "arms.mlp_75_33.model=dense:8 relu dense:classes",
    "lanes.seed=0..2",
    "batch_size=100",
    "data.train=1000",
    "checkpoint.share=1",
]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def together(folder, *fields, others=(), devices=2):
    """Starts two processes; `others` are fields of process 1 alone."""
    joined = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    processes = []
    for number, own in ((0, ()), (1, others)):
        command = [
            *RUN,
            *SMALL,
            *fields,
            *own,
            "--out",
            str(folder / "run"),
            *joined,
            "--process-id",
            str(number),
        ]
        log = (folder / f"{number}.log").open("w")
        processes.append(
            subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(devices), cwd=folder)
        )
        log.close()
    return processes


def alone(folder, *fields, devices=2):
    command = [*RUN, *SMALL, *fields, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(devices), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return arms_of(folder)


def arms_of(folder):
    results = json.loads((folder / "results.json").read_text())
    return {arm["name"]: arm for arm in results["arms"]}


def said(folder, number):
    return [line for line in (folder / f"{number}.log").read_text().splitlines() if "Gloo" not in line]


def until_epoch(folder, epoch, processes):
    """Waits until that many epochs of the first arm are written down."""
    metrics = folder / "run" / "metrics.jsonl"
    for _ in range(6000):
        assert all(process.poll() is None for process in processes), [said(folder, 0), said(folder, 1)]
        if metrics.exists() and f'"epoch": {epoch},' in metrics.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("no epoch ended in ten minutes")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What one process with two devices comes to."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return alone(folder, "epochs=3")


LONG = "epochs=20"


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The same of a run that is long enough to be killed."""
    return alone(tmp_path_factory.mktemp("long") / "run", LONG)


def assert_alike(arms, plain):
    for name, arm in arms.items():
        for own, other in zip(arm["lanes"], plain[name]["lanes"], strict=True):
            assert own["seed"] == other["seed"] and own["epochs"] == other["epochs"]
            assert own["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)


def test_two_processes_train_one_population_and_the_first_writes(tmp_path, plain):
    processes = together(tmp_path, "epochs=3")
    assert [process.wait(600) for process in processes] == [0, 0], [said(tmp_path, 0), said(tmp_path, 1)]
    arms = arms_of(tmp_path / "run")
    assert [arm["mesh"] for arm in arms.values()] == [[3, 1], [3, 1]]  # on two devices of the first, one of the other
    assert_alike(arms, plain)
    # A convolution's lanes run one after another, wherever they do: to the last bit.
    fingerprints = [[lane["parameters_sha256"] for lane in found["lenet5"]["lanes"]] for found in (arms, plain)]
    assert fingerprints[0] == fingerprints[1]
    assert said(tmp_path, 1) == ["process 1 of 2 trains fc_vs_conv; process 0 tells and writes"]
    device = json.loads((tmp_path / "run" / "results.json").read_text())["device"]
    assert (device["count"], device["hosts"]) == (3, 2)


def test_batches_are_shared_by_devices_of_two_hosts(tmp_path, plain):
    processes = together(tmp_path, "epochs=3", "mesh=1,4")
    assert [process.wait(600) for process in processes] == [0, 0], [said(tmp_path, 0), said(tmp_path, 1)]
    arms = arms_of(tmp_path / "run")
    assert [arm["mesh"] for arm in arms.values()] == [[1, 4], [1, 4]]
    assert_alike(arms, plain)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_resume_goes_on(tmp_path, long, victim):
    processes = together(tmp_path, LONG)
    until_epoch(tmp_path, 3, processes)
    processes[victim].kill()
    processes[victim].wait()
    killed = time.monotonic()
    survivor = processes[1 - victim]
    assert survivor.wait(300) != 0
    assert time.monotonic() - killed < 60
    advice = "if a host dies, the same commands with --resume, on all hosts, go on with what is saved"
    assert advice in said(tmp_path, 0) and advice in (tmp_path / "run" / "log.txt").read_text()
    # One process goes on with what two have begun.
    arms = alone(tmp_path / "run", LONG, "--resume")
    assert_alike(arms, long)
    fingerprints = [[lane["parameters_sha256"] for lane in found["lenet5"]["lanes"]] for found in (arms, long)]
    assert fingerprints[0] == fingerprints[1]
    resumed = json.loads((tmp_path / "run" / "results.json").read_text())["resumed"]
    assert (len(resumed) == 1 and resumed[0]["in_flight"].get("mlp_75_33", 0) >= 1) or resumed[0]["finished"]


def test_two_processes_go_on_with_what_a_signal_to_one_has_stopped(tmp_path, long):
    processes = together(tmp_path, LONG)
    until_epoch(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses = [process.wait(300) for process in processes]
    assert statuses == [128 + signal.SIGTERM] * 2, [said(tmp_path, 0), said(tmp_path, 1)]
    last = said(tmp_path, 0)[-1]
    assert "; go on, each host with its own --process-id, with: cnnlib run fc_vs_conv" in last
    assert "--wandb off --distributed --coordinator 127.0.0.1:" in last
    assert last.endswith("--processes 2 --process-id 0 --resume")
    processes = together(tmp_path, LONG, "--resume")
    assert [process.wait(600) for process in processes] == [0, 0], [said(tmp_path, 0), said(tmp_path, 1)]
    assert_alike(arms_of(tmp_path / "run"), long)


def test_processes_that_would_not_compute_the_same_are_told_apart(tmp_path):
    processes = together(tmp_path, "epochs=2", others=["epochs=3", "checkpoint.every=2"])
    assert [process.wait(120) for process in processes] == [2, 2]
    for number in (0, 1):
        last = said(tmp_path, number)[-1]
        assert last.startswith("error: process 1 of 2: differences from process 0: ")
        assert "epochs was 2, is 3" in last and "checkpoint.every was 1, is 2" in last
    assert not (tmp_path / "run").exists()


def test_a_host_without_work_is_one_line(tmp_path):
    processes = together(tmp_path, "lanes.seed=0")
    assert [process.wait(120) for process in processes] == [2, 2]
    assert "a mesh of 1,1 leaves nothing to do for process 1 of 2: 1 lanes need fewer hosts" in said(tmp_path, 0)[-1]
