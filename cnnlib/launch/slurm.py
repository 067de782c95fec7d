"""Run jobs on Slurm: one job array trains, then one job merges the results. People can read and edit both scripts."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which

from cnnlib.errors import UserError

SIGNAL_SECONDS = 120
"""Seconds before the time limit at which Slurm asks a job to save its epoch and end."""
REQUEUED = """\
# The job saves its epoch and ends when Slurm asks it to, ahead of the time limit.
trap 'asked=yes; kill -TERM "$run"' TERM
eval "exec ${commands[$SLURM_ARRAY_TASK_ID]}" &
run=$!
[ -z "$asked" ] || kill -TERM "$run" # asked between these two lines
wait "$run"
status=$?
while kill -0 "$run" 2> /dev/null; do # the first wait ends when the signal comes
    wait "$run"
    status=$?
done

# Slurm itself requeues a job after a failed node or a preemption. A process that ended by a signal (status above 128)
# is queued again here; it goes on from its checkpoint.
if [ "$status" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt RETRIES ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    sleep 60 # until Slurm ends this attempt
fi
exit "$status"
"""


def array_script(
    commands: Mapping[str, Sequence[str]],
    place: Path,
    options: Sequence[str],
    cores: int,
    gpus: int,
    at_a_time: int | None,
    retries: int,
) -> str:
    """Return the job-array script: one task per job.

    Args:
        commands: For each job name, the command of the job.
        place: The folder for the output of the tasks.
        options: Options of `sbatch`, without the leading dashes. They come last, so they override the other options.
        cores: Number of cores per job.
        gpus: Number of GPUs per job.
        at_a_time: Most jobs that may run at the same time; None: as many as Slurm has room for.
        retries: How often a job is queued again after a signal ended it.
    """
    most = f"%{at_a_time}" if at_a_time else ""
    lines = [
        "job-name=cnnlib",
        f"array=0-{len(commands) - 1}{most}",
        f"output={place}/slurm-%a.log",
        "open-mode=append",
        "requeue",
        f"signal=B:TERM@{SIGNAL_SECONDS}",
        f"cpus-per-task={cores}",
        *([f"gpus={gpus}"] if gpus else []),
        *options,
    ]
    header = "\n".join(f"#SBATCH --{line}" for line in lines)
    listed = "\n".join(f"    {shlex.quote(shlex.join(command))}" for command in commands.values())
    end = REQUEUED.replace("RETRIES", str(retries))
    return f"#!/bin/bash\n{header}\n\ncd {shlex.quote(str(Path.cwd()))} || exit 2\ncommands=(\n{listed}\n)\n\n{end}"


def merge_script(out: Path, place: Path, more: Sequence[str], options: Sequence[str]) -> str:
    """Return the script of the job that merges. Of `options`, only `partition`, `account` and `qos` are used."""
    taken = [one for one in options if one.partition("=")[0] in ("partition", "account", "qos")]
    lines = ["job-name=cnnlib-merge", f"output={place}/slurm-merge.log", *taken]
    header = "\n".join(f"#SBATCH --{line}" for line in lines)
    command = shlex.join([sys.executable, "-m", "cnnlib", "merge", str(out), *more])
    return f"#!/bin/bash\n{header}\n\ncd {shlex.quote(str(Path.cwd()))} || exit 2\n{command}\n"


def submit(array: Path, merge: Path) -> tuple[str, str]:
    """Submit both scripts. The script `merge` runs after all tasks of the script `array` succeed. Return both job ids.

    Raise UserError if this machine has no `sbatch`, or if Slurm rejects a script.
    """
    if which("sbatch") is None:
        raise UserError(
            f"there is no sbatch here; where there is: sbatch {array}, then sbatch --dependency=afterok:ID {merge}"
        )
    first = _sbatch(str(array))
    return first, _sbatch(f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes", str(merge))


def _sbatch(*arguments: str) -> str:
    done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[:300]
        raise UserError(f"sbatch does not take {arguments[-1]}: {reason}")
    return done.stdout.strip().partition(";")[0]
