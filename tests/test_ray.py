"""Jobs on a cluster of Ray: a head and two workers on this machine, one of which dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray has no wheel for this Python")

NAMES = ("mlp", "cnn")
FIELDS = [f"arms={','.join(NAMES)}", "epochs=20", "lanes.seed=0..5", "devices=1", "checkpoint.share=1"]

ENDING = 60.0
"""Seconds: what writes checkpoints does so at the lowest priority, and also ends at it."""


def environment(tmp_path, **change):
    """Of every process here; only those that know the token may use the cluster."""
    token = tmp_path / "token"
    if not token.exists():
        token.write_text(secrets.token_hex(32))
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.read_text(), "RAY_USAGE_STATS_ENABLED": "0"}
    known["RAY_raylet_start_wait_time_s"] = "300"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled", **known, **change}


def command(out, *arguments):
    return [sys.executable, "-m", "experiments", "run", "mnist1d", *FIELDS, "--out", str(out), *arguments]


def processes():
    """Parents, states and command lines of all processes, by their ids."""
    found = {}
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = (place / "stat").read_text()
            state, parent = text.rpartition(")")[2].split()[:2]
            words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[int(place.name)] = (int(parent), state, words)
    return found


def tree(root):
    """The process and all that it has started, theirs included, and the command line of each, at one moment."""
    known, found = processes(), [root]
    for pid in found:
        found += [other for other, (parent, _, _) in known.items() if parent == pid]
    return {pid: known[pid][2] for pid in found if pid in known}


def jobs_of(node):
    return [pid for pid, words in tree(node.pid).items() if is_of_job(words)]


def is_of_job(words):
    return "-m cnnlib.job" in words or "-m cnnlib.checkpoint" in words


def living(pids):
    known = processes()
    return [pid for pid in pids if known.get(pid, (0, "Z", ""))[1] != "Z"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Cluster:
    """Nodes of Ray on this machine, each a process that holds what belongs to the node."""

    def __init__(self, folder):
        self.folder, self.nodes, self.environment = folder, [], environment(folder)
        self.address = f"127.0.0.1:{free_port()}"

    def begin(self, *arguments):
        """Starts a node, and waits until it is one."""
        options = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--block", *arguments]
        log = self.folder / f"node-{len(self.nodes)}.txt"
        with log.open("wb") as file:
            start = [str(Path(sys.executable).with_name("ray")), "start", *options]
            self.nodes.append(subprocess.Popen(start, stdout=file, stderr=file, env=self.environment))
        until = time.monotonic() + 300
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert self.nodes[-1].poll() is None and time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.1)
        return self.nodes[-1]

    def kill(self, node):
        """Kills the node's own processes, and leaves alone those of jobs that they have started: returns these."""
        members = tree(node.pid)
        jobs = [pid for pid, words in members.items() if is_of_job(words)]
        for pid in members:
            if pid not in jobs:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        node.wait()
        return jobs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("ray"))
    _, _, port = made.address.partition(":")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        try:
            head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--disable-usage-stats"]
            made.begin(*head, f"--temp-dir={temporary}")  # paths of sockets are short
            yield made
        finally:
            for node in made.nodes:
                if node.poll() is None:
                    made.kill(node)


def worker(cluster):
    return cluster.begin(f"--address={cluster.address}", "--num-cpus=1")


def fingerprints(out):
    arms = json.loads((out / "results.json").read_text())["arms"]
    return {arm["name"]: [lane["parameters_sha256"] for lane in arm["lanes"]] for arm in arms}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run in one process comes to."""
    out = tmp_path_factory.mktemp("whole")
    start = command(out / "run")
    done = subprocess.run(start, capture_output=True, text=True, check=False, env=environment(out))
    assert done.returncode == 0, done.stderr
    return fingerprints(out / "run")


@contextlib.contextmanager
def started(environment, out, *arguments):
    """A run that has told an epoch; killed in the end, if it lives."""
    start = command(out, "--executor", "ray", *arguments)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(start, **pipes, env=environment) as process:
        told = []
        try:
            while not told or "epoch 1/" not in told[-1]:
                told.append(process.stdout.readline())
                assert told[-1], "".join(told)
            yield process, told
        finally:
            process.kill()


def ending(process, told):
    """The status, when a run has ended; what it still says is added to `told`."""
    said, _ = process.communicate(timeout=300)
    told += said.splitlines(keepends=True)
    return process.returncode


@pytest.mark.slow
def test_a_node_that_dies_at_a_random_moment_costs_no_bit_and_nothing_is_trained_twice(cluster, whole, tmp_path):
    went_on = []
    chance, workers = random.Random(0), [worker(cluster), worker(cluster)]
    for number in range(2):
        out = tmp_path / str(number)
        with started(cluster.environment, out, "--ray-address", cluster.address) as (process, told):
            epochs, moment = chance.randrange(1, 36), chance.uniform(0.0, 0.3)
            while (out / "log.txt").read_text().count(": epoch ") < epochs:  # 20 and 20; machines are not equally fast
                assert process.poll() is None, "".join(told)
                time.sleep(0.02)
            time.sleep(moment)
            victim = chance.choice([node for node in workers if jobs_of(node)] or workers)
            orphans = cluster.kill(victim)
            killed = time.monotonic()
            while living(orphans):
                assert time.monotonic() < killed + ENDING, [processes().get(pid) for pid in orphans]
                time.sleep(0.05)
            workers[workers.index(victim)] = worker(cluster)
            assert ending(process, told) == 0, "".join(told)
        assert fingerprints(out) == whole
        record = json.loads((out / "run.json").read_text())["jobs"]
        log = (out / "log.txt").read_text()
        for name in NAMES:
            *before, last = record[name]["sessions"]
            # An epoch is told before it is saved: the last may be trained again where the node died in between.
            once_more = any(one["in_flight"].get(name) == 19 for one in record[name]["resumed"])
            assert 1 <= log.count(f"{name}: epoch 20/20") <= 1 + once_more, log
            assert last["state"] == "finished" and all(one["state"] == "running" for one in before)
            assert len(before) <= 1 and len(record[name]["resumed"]) == len(before)
            # It went on after the last epoch that was saved.
            for resumed in record[name]["resumed"]:
                if resumed["in_flight"]:
                    epoch = resumed["in_flight"][name]
                    assert f"{name}: trains, after epoch {epoch}" in log
                    assert log.count(f"{name}: epoch {epoch}/20") == 1
                    went_on.append((name, epoch))
        assert not (out / "jobs").exists()
        counts = {name: [len(record[name]["sessions"]), record[name]["resumed"]] for name in NAMES}
        told = f"run {number}: killed {moment:.2f} s after {epochs} epochs, {len(orphans)} orphans; {counts}\n"
        sys.stdout.write(told)
        if went_on:
            break
    assert went_on, "no job was killed while it trained"
    assert not [words for _, _, words in processes().values() if str(tmp_path) in words]
    assert not [job for node in cluster.nodes if node.poll() is None for job in jobs_of(node)]


@pytest.mark.slow
def test_a_run_that_is_stopped_lets_the_nodes_save_and_goes_on(cluster, whole, tmp_path):
    node = worker(cluster)
    on = ("--ray-address", cluster.address)
    with started(cluster.environment, tmp_path, *on) as (process, told):
        process.send_signal(signal.SIGTERM)
        assert ending(process, told) == 143
        assert told[-1].endswith(f"--executor ray --ray-address {cluster.address} --resume\n")
    assert not jobs_of(node)
    again = command(tmp_path, "--executor", "ray", *on, "--resume")
    done = subprocess.run(again, capture_output=True, text=True, check=False, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    assert fingerprints(tmp_path) == whole and "goes on after epoch" in done.stdout


@pytest.mark.slow
def test_a_job_that_ray_gives_up_ends_the_run_which_is_gone_on_with(cluster, whole, tmp_path):
    worker(cluster)
    on = ("--ray-address", cluster.address)
    with started(cluster.environment, tmp_path, *on, "--retries", "0") as (process, told):
        for node in cluster.nodes:
            if node.poll() is None and jobs_of(node):
                cluster.kill(node)
        assert ending(process, told) == 2
    assert "was lost by Ray, which has tried again 0 times" in told[-1], "".join(told)
    worker(cluster)
    again = command(tmp_path, "--executor", "ray", *on, "--resume")
    done = subprocess.run(again, capture_output=True, text=True, check=False, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    assert fingerprints(tmp_path) == whole


@pytest.mark.slow
def test_a_command_that_is_killed_takes_its_own_cluster_along_and_is_resumed(whole, tmp_path):
    known = {name: text for name, text in environment(tmp_path).items() if not name.startswith("RAY_AUTH")}
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # with programs that are compiled
    known |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": cache, "RAY_TMPDIR": "/tmp"}  # paths of sockets are short
    with started(known, tmp_path / "run") as (process, _):
        family = tree(process.pid)
        assert any("raylet" in words for words in family.values())
        process.kill()
        process.wait()
        until = time.monotonic() + ENDING
        while living(family):
            assert time.monotonic() < until, [processes().get(pid) for pid in living(family)]
            time.sleep(0.1)
    again = command(tmp_path / "run", "--executor", "ray", "--resume")
    done = subprocess.run(again, capture_output=True, text=True, check=False, env=known)
    assert done.returncode == 0, done.stderr
    assert fingerprints(tmp_path / "run") == whole
    assert not (tmp_path / ".ray").exists()  # where Ray would leave a token for others to find
