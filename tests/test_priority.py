"""Processes beside the training take the processor only where it is idle, until somebody waits for them."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys

import pytest

from cnnlib import priority

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
