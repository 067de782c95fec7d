"""Jobs on Slurm: the scripts, and where Debian's Slurm is installed, real jobs on a cluster of this machine alone."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnnlib.errors import UserError
from cnnlib.launch import slurm

COMMANDS = {"a-0..1": ["python", "-m", "x", "model=dense:3 relu"], "b": ["python", "it's"]}


def test_the_array_has_a_task_per_job_and_what_was_asked_for(tmp_path):
    text = slurm.array_script(COMMANDS, tmp_path, ["time=04:00:00", "mem=8G"], 2, 1, 3, 5)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"array=0-1%3", "cpus-per-task=2", "gpus=1", "time=04:00:00", "mem=8G", "requeue"} <= set(options)
    assert "signal=B:TERM@120" in options and '"${SLURM_RESTART_COUNT:-0}" -lt 5' in text
    assert "gpus" not in slurm.array_script(COMMANDS, tmp_path, [], 2, 0, None, 5).split("cd ")[0]


def run_task(tmp_path, command, task=0, requeued=0):
    """Run the script as Slurm does, with an `scontrol` that notes what it is asked."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("scontrol", "sleep"):
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "array.sh"
    script.write_text(slurm.array_script({"first": ["true"], "second": command}, tmp_path, [], 1, 0, None, 2))
    known = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7", "SLURM_RESTART_COUNT": str(requeued)}
    environment = {**os.environ, **known, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    status = subprocess.run(["bash", str(script)], env=environment, capture_output=True, check=False).returncode
    return status, (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []


@pytest.mark.parametrize(
    ("command", "requeued", "status", "asked"),
    [
        (["sh", "-c", 'test "$1" = "a  b"', "-", "a  b"], 0, 0, []),
        (["sh", "-c", "exit 2"], 0, 2, []),  # a mistake is not tried again
        (["sh", "-c", "kill -9 $$"], 1, 137, ["requeue", "7_1"]),
        (["sh", "-c", "kill -9 $$"], 2, 137, []),
        (["sh", "-c", "exit 143"], 0, 143, ["requeue", "7_1"]),  # it has saved its epoch ahead of the time limit
    ],
)
def test_a_task_runs_its_job_and_is_queued_again_after_a_signal(command, requeued, status, asked, tmp_path):
    assert run_task(tmp_path, command, 1, requeued) == (status, asked)


def test_the_job_is_told_ahead_of_the_time_limit(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    waits = f"trap 'echo saved > {tmp_path}/out; exit 0' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    script = tmp_path / "array.sh"
    script.write_text(slurm.array_script({"only": ["sh", "-c", waits]}, tmp_path, [], 1, 0, None, 2))
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", str(script)], env=environment) as task:
        while not (tmp_path / "ready").exists():
            assert task.poll() is None
        task.send_signal(signal.SIGTERM)
        assert task.wait(60) == 0
    assert (tmp_path / "out").read_text() == "saved\n"


def test_without_slurm_the_scripts_are_there_and_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(slurm, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"no sbatch here; where there is: sbatch a.sh, then sbatch --dependency=afterok"
    ):
        slurm.submit(Path("a.sh"), Path("m.sh"))


# A Slurm of this machine alone.

CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
CryptoType=crypto/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
FIELDS = ["arms=mlp,cnn", "epochs=30", "lanes.seed=0..3", "checkpoint.share=1", "--wandb", "off"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which Slurm's commands find a cluster that ends with the tests."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if os.geteuid() != 0 or any(shutil.which(name, path=path) is None for name in PROGRAMS):
        pytest.skip("needs root and Debian's packages slurmctld, slurmd, slurm-client and munge")
    place = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (place / name).mkdir(mode=0o700)
    key = place / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = {"controller": free_port(), "daemon": free_port()}
    names = {"host": socket.gethostname().partition(".")[0], "place": place, "cores": os.cpu_count()}
    (place / "slurm.conf").write_text(CONF.format(**names, **ports))
    environment = {**os.environ, "SLURM_CONF": str(place / "slurm.conf"), "PATH": path, "JAX_PLATFORMS": "cpu"}
    munge = [f"--{what}={place}/munge/{name}" for what, name in (("key-file", "key"), ("socket", "socket"))]
    munge += [f"--{what}-file={place}/munge/{what}" for what in ("pid", "log", "seed")]
    daemons = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (["munged", "--force", "--foreground", *munge], ["slurmctld", "-D"], ["slurmd", "-D"])
    ]
    try:
        until = time.monotonic() + 60
        while "idle" not in asked(environment, "sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < until, [path.read_text()[-2000:] for path in place.glob("*.log")]
            time.sleep(0.2)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def asked(environment, *command):
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def fingerprints(out):
    arms = json.loads((out / "results.json").read_text())["arms"]
    return {arm["name"]: [lane["parameters_sha256"] for lane in arm["lanes"]] for arm in arms}


def command(out, *arguments):
    return [sys.executable, "-m", "cnnlib", "run", "mnist1d", *FIELDS, "--out", str(out), *arguments]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run in one process comes to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(
        command(out, "devices=1"), check=True, capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    return fingerprints(out)


def epochs_saved(job):
    return [int(path.name) for path in (job / "checkpoints").glob("*/*") if path.name.isdecimal()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "requeued"])
def test_a_job_that_is_killed_or_requeued_goes_on_and_all_are_merged(how, cluster, whole, tmp_path):
    out = tmp_path / "run"
    told = subprocess.run(
        command(out, "--executor", "slurm", "--slurm", "time=01:00:00"),
        env=cluster,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0 and "submitted" in told.stdout, told.stderr
    script = (out / "jobs" / "array.sh").read_text()
    assert "#SBATCH --time=01:00:00" in script and shlex.quote(sys.executable) in script
    until = time.monotonic() + 400
    victim = out / "jobs" / "cnn"
    while max(epochs_saved(victim), default=0) < 2:
        assert time.monotonic() < until, asked(cluster, "squeue")
        time.sleep(0.02)
    array = asked(cluster, "squeue", "-h", "-r", "-n", "cnnlib", "-o", "%F").split()[0]
    if how == "killed":
        os.kill(json.loads((victim / "run.json").read_text())["sessions"][-1]["pid"], signal.SIGKILL)
    else:
        asked(cluster, "scontrol", "requeue", f"{array}_1")
    has_start_time = False
    while not (out / "results.json").exists():
        assert time.monotonic() < until, asked(cluster, "squeue") + (out / "jobs" / "slurm-1.log").read_text()
        # A job that is queued again waits for two minutes. The test shortens that to two seconds. It must not be zero:
        # Slurm kills a job that starts in the second in which its old credential was revoked.
        waiting = asked(cluster, "scontrol", "show", "job", f"{array}_1")
        if "BeginTime" in waiting and not has_start_time:
            asked(cluster, "scontrol", "update", f"JobId={array}_1", "StartTime=now+2")
            has_start_time = True
        assert "DependencyNeverSatisfied" not in waiting
        time.sleep(0.5)
    assert fingerprints(out) == whole
    known = json.loads((out / "run.json").read_text())["jobs"]
    assert len(known["cnn"]["sessions"]) == 2 and known["cnn"]["resumed"][0]["in_flight"]["cnn"] >= 2
