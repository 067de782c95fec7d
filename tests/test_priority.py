"""Processes beside the training take the processor only where it is idle, until somebody waits for them."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cnnlib import checkpoint, priority, writer
from cnnlib.writer import Job, Writer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is asked here only Linux tells")


@contextlib.contextmanager
def process(script):
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as started:
        try:
            yield started
        finally:
            started.kill()


THREADS = """
import subprocess, sys, threading, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""


def seen(process):
    """Policies and priorities of all threads of a process and its children."""
    threads = [thread for one in (process, *priority.children(process)) for thread in priority.threads(one)]
    return [(os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)) for thread in threads]


def test_threads_and_children_are_lowered_and_raised():
    usual = (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))
    with process(THREADS) as one:
        one.stdout.readline()
        assert seen(one.pid) == [usual] * 3
        priority.lower(one.pid)
        assert seen(one.pid) == [(os.SCHED_IDLE, priority.LOWEST)] * 3
        if priority.lend(one.pid):
            assert seen(one.pid) == [usual] * 3
        for child in priority.children(one.pid):
            os.kill(child, 9)
    priority.lower(one.pid)  # which is no more
    assert priority.lend(one.pid)


def test_a_sandbox_without_idle_processes_lowers_them_as_far_as_it_can(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with process("import time; time.sleep(60)") as one:
        priority.lower(one.pid)
        assert os.getpriority(os.PRIO_PROCESS, one.pid) == priority.LOWEST


def a_job(folder):
    words = np.arange(80, dtype=np.uint32).reshape(8, -1)
    taken = checkpoint.Snapshot(jax.device_put(words), np.asarray(checkpoint.checksums_of(words)))
    return Job(folder, folder / "arm", 1, 1, None, {}, taken, 8, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("may_raise", [True, False])
def test_who_waits_for_a_checkpoint_on_a_busy_machine_gets_it(may_raise, tmp_path, monkeypatch):
    core = {min(os.sched_getaffinity(0))}
    with process("while True: pass") as other, contextlib.closing(Writer()) as held:
        first = held._process.pid
        if may_raise:
            if not priority.lend(first):
                pytest.skip("only administrators may raise a priority here")
            priority.lower(first)
        else:
            monkeypatch.setattr(priority, "lend", lambda process: False)
            monkeypatch.setattr(writer, "HESITATION", 0.5)
        for pid in (other.pid, first):
            os.sched_setaffinity(pid, core)
        held.put(a_job(tmp_path))
        time.sleep(5)
        assert not held.has_written(tmp_path / "arm", 1)  # while nobody waits, whoever else works goes first
        held.wait()
        assert held.has_written(tmp_path / "arm", 1) and (held._process.pid == first) == may_raise
        pid = held._process.pid
        assert (os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)) == (os.SCHED_IDLE, priority.LOWEST)
        held.put(a_job(tmp_path)._replace(epoch=2))
        held.wait()
        assert (tmp_path / "arm" / "2").is_dir()
