"""Jobs on a cluster of Ray, of this machine, whose workers die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("ray", reason="Ray has no wheel for this Python")
pytestmark = pytest.mark.slow

FIELDS = ["arms=mlp,cnn", "epochs=30", "lanes.seed=0..5", "devices=1", "checkpoint.share=1", "--wandb", "off"]


def environment():
    # Paths of sockets are short.
    return {**os.environ, "JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}


def command(out, *arguments):
    return [sys.executable, "-m", "cnnlib", "run", "mnist1d", *FIELDS, "--out", str(out), *arguments]


def done(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=500)


def fingerprints(out):
    arms = json.loads((out / "results.json").read_text())["arms"]
    return {arm["name"]: [lane["parameters_sha256"] for lane in arm["lanes"]] for arm in arms}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run in one process comes to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = done(*command(out))
    assert ended.returncode == 0, ended.stderr
    return fingerprints(out)


def epochs_saved(job):
    """The epochs after which a job has a checkpoint that is whole."""
    return [int(path.name) for path in (job / "checkpoints").glob("*/*") if path.name.isdecimal()]


@contextlib.contextmanager
def started(out, *arguments):
    """A run as jobs of which one has saved its second epoch; killed in the end, if it lives."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command(out, "--executor", "ray", *arguments), **pipes, env=environment()) as process:
        try:
            until = time.monotonic() + 400
            while not (ready := [job for job in out.glob("jobs/*") if max(epochs_saved(job), default=0) > 1]):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            yield process, ready[0]
        finally:
            process.kill()


def session(job):
    return json.loads((job / "run.json").read_text())["sessions"][-1]


def test_a_worker_that_is_killed_is_started_again_and_goes_on(whole, tmp_path):
    with started(tmp_path) as (process, job):
        os.kill(session(job)["pid"], signal.SIGKILL)  # the job runs in Ray's worker
        told, _ = process.communicate(timeout=500)
    assert process.returncode == 0, told
    assert fingerprints(tmp_path) == whole and f"{job.name} is finished" in told
    known = json.loads((tmp_path / "run.json").read_text())["jobs"][job.name]
    assert len(known["sessions"]) == 2 and known["resumed"][0]["in_flight"][job.name] > 1


def test_a_run_that_is_stopped_saves_and_goes_on(whole, tmp_path):
    with started(tmp_path) as (process, job):
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=500)
    assert process.returncode == 143, told
    assert told.splitlines()[-1].endswith("--executor ray --resume")
    before = max(epochs_saved(job))
    resumed = done(*command(tmp_path, "--executor", "ray", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert fingerprints(tmp_path) == whole and before > 1


def test_a_job_that_ray_gives_up_ends_the_run(tmp_path):
    with started(tmp_path, "--retries", "0") as (process, job):
        os.kill(session(job)["pid"], signal.SIGKILL)
        told, _ = process.communicate(timeout=500)
    assert process.returncode == 2
    assert f"error: job {job.name} was lost by Ray: " in told.splitlines()[-1], told


def test_no_cluster_is_one_line(tmp_path):
    refused = done(*command(tmp_path, "--executor", "ray", "--ray-address", "127.0.0.1:1"))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: --executor ray: no cluster at 127.0.0.1:1: ")
