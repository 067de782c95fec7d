"""A run in a process of its own that is killed, stopped or out of space ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from resuming import comparable

# In processes of their own, by really doing it. The data are the packaged ones.

# Nets that train for longer than the writer of checkpoints takes to start.
TINY = ["arms=mlp_75_33,lenet5", "epochs=4", "lanes.seed=0,1", "checkpoint.share=1"]
DIVERGING = ["optim.name=sgd", "optim.learning_rate=0.01,1e8"]


def command(out, *arguments):
    return [sys.executable, "-m", "cnnlib", "run", "fc_vs_conv", *TINY, "--out", str(out), *arguments]


def environment(**change):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled", **change}


def done(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), **options)


@contextlib.contextmanager
def started(out, *arguments):
    """A run that has told its first epoch; killed in the end, if it lives."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(out, *arguments), **pipes, env=environment()) as process:
        assert process.stdout is not None
        try:
            while "epoch 1/" not in process.stdout.readline():
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def limited(limit, *command):
    """In a shell with a `ulimit`."""
    return done("bash", "-c", f'ulimit {limit}; exec "$@"', "-", *command)


def finished(out, *arguments):
    """An uninterrupted run."""
    whole = done(*command(out, *arguments))
    assert whole.returncode == 0, whole.stderr
    return out


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("packaged"))


def killed_twice_and_resumed(whole, out, chance, *arguments):
    """Kill a run, and once more when it goes on; then it must end as the `whole` one.

    The first kill waits for a checkpoint of the arm that trains longest. Returns what each session found.
    """
    for again in ([], ["--resume"]):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command(out, *arguments, *again), **pipes, env=environment()) as process:
            if not again:
                while not any(out.glob("checkpoints/lenet5/[0-9]*")):
                    assert process.poll() is None
                    time.sleep(0.01)
            else:
                epochs = (line for line in process.stdout if re.search(r"epoch \d+/", line))
                for _ in itertools.islice(epochs, chance.randrange(1, 8)):
                    pass
                time.sleep(chance.uniform(0.0, 0.2))  # epochs take about as long
            process.kill()
    resumed = done(*command(out, *arguments, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(out) == comparable(whole)
    return json.loads((out / "results.json").read_text())["resumed"]


@pytest.mark.slow
def test_a_run_that_is_killed_twice_with_lanes_that_diverge_is_resumed_to_the_same_bits(tmp_path):
    whole = finished(tmp_path / "whole", *DIVERGING)
    for arm in json.loads((whole / "results.json").read_text())["arms"]:
        assert [lane["status"] for lane in arm["lanes"]] == ["ok", "ok", "diverged", "diverged"]
    # Once as soon as the arm that trains longest has a checkpoint, and once at a random moment.
    sessions = killed_twice_and_resumed(whole, tmp_path / "killed", random.Random(0), *DIVERGING)
    assert any(session["in_flight"] for session in sessions)


@pytest.mark.slow
def test_a_signal_ends_the_run_at_the_end_of_an_epoch(packaged, tmp_path):
    with started(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 143
    first, last = told.splitlines()
    assert first == "stopping at the end of this epoch, and saving it; once more stops at once"
    assert last.startswith("stopped after epoch ") and last.endswith("--resume")
    resumed = done("bash", "-c", last.split("go on with: ")[1].replace("cnnlib ", f"{sys.executable} -m cnnlib ", 1))
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(tmp_path) == comparable(packaged)


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(tmp_path):
    with started(tmp_path, "epochs=1000", "passes=30") as process:  # epochs of some seconds
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 130 and told == ""  # not the end of the epoch, and how to go on


@pytest.mark.slow
def test_a_second_run_into_the_folder_is_refused(tmp_path):
    with started(tmp_path, "epochs=1000") as process:
        for arguments in ((), ("--resume",)):
            second = done(*command(tmp_path, *arguments))
            assert second.returncode == 2 and f"a run is going on in {tmp_path} (process {process.pid}" in second.stderr
            assert len(second.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_a_clear_error_and_costs_nothing_that_was_saved(packaged, tmp_path):
    with started(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    kept = {path.name for arm in (tmp_path / "checkpoints").iterdir() for path in arm.iterdir()}
    refused = limited("-f 40", *command(tmp_path, "--resume"))  # files of 40 kB: the next checkpoint does not fit
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "cannot write" in refused.stderr
    assert kept <= {path.name for arm in (tmp_path / "checkpoints").iterdir() for path in arm.iterdir()}
    resumed = done(*command(tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert comparable(tmp_path) == comparable(packaged)


@pytest.mark.slow
def test_a_full_disk_and_one_that_is_only_read_are_clear_errors(tmp_path):
    """On file systems made for it, where this user may mount some."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=2m none {disk} || exit 77
        test $1 = rw || mount -o remount,ro {disk}
        shift; "$@"; status=$?
        ls {disk}/run/checkpoints/* >&2; exit $status
    """
    if done("unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)).returncode != 0:
        pytest.skip("no right to mount anything here")
    full = done("unshare", "-rm", "bash", "-c", script, "-", "rw", *command(disk / "run"))
    first, *rest = full.stderr.splitlines()
    assert full.returncode == 2 and first.startswith("error: cannot write") and "No space left" in first, full.stderr
    assert "1" in rest  # the checkpoint that was whole
    read_only = done("unshare", "-rm", "bash", "-c", script, "-", "ro", *command(disk / "run"))
    assert read_only.returncode == 2 and "Read-only file system" in read_only.stderr.splitlines()[0]


@pytest.mark.slow
def test_too_little_memory_says_which_arm_and_how_many_lanes_would_fit(tmp_path):
    code = "import jax, cnnlib.runs.runner; jax.devices(); print(open('/proc/self/status').read())"
    taken = int(re.search(r"VmSize:\s*(\d+) kB", done(sys.executable, "-c", code).stdout)[1])
    many = ["arms=lenet5", "devices=1", "lanes.seed=0..63", "lanes.at_a_time=64", "batch_size=500", "epochs=1"]
    many += ["data.train=1000"]
    # How many addresses compilers and threads take depends on the machine, and LLVM gives up without a word to us.
    for spare in range(1_000_000, 4_500_000, 500_000):
        limit = f"-v {taken + spare}"
        refused = limited(limit, *command(tmp_path / "run", *many))
        if "would fit" in refused.stderr:
            break
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert refused.stderr.startswith("error: arm lenet5: 64 lanes, 64 at a time, need ")
    fits = int(refused.stderr.rsplit("would fit: lanes.at_a_time=", 1)[1])
    assert 1 <= fits < 64 and not (tmp_path / "run").exists()
    more = f"-v {taken + spare + 250_000}"  # addresses that the parts of LLVM and stacks of threads leave unused
    fitting = limited(more, *command(tmp_path / "run", *many, f"lanes.at_a_time={fits}"))
    assert fitting.returncode == 0, fitting.stderr
