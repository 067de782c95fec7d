"""The processes of a run on several hosts: what they tell each other, and what happens when one ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from cnnlib.errors import UserError
from cnnlib.train.multihost import ALONE, Hosts, asked

pytestmark = pytest.mark.once

ADDRESS = "127.0.0.1"


def test_a_process_alone_agrees_with_itself():
    with ALONE as alone:
        assert alone.is_first and (alone.process, alone.count) == (0, 1)
        assert alone.gathered(b"text") == [b"text"] and alone.from_first(b"text") == b"text"
        assert alone.agreed(True) and not alone.agreed(False)
        assert alone.lowest(7) == 7
        alone.same("jax", "0.10")
    with pytest.raises(ValueError, match="gives nothing"):
        alone.from_first(None)


def test_who_differs_from_the_first_is_named(monkeypatch):
    monkeypatch.setattr(Hosts, "gathered", lambda hosts, value: [b"one", b"one", b"two"])
    with pytest.raises(UserError, match=r"^process 2 of 3: data two, process 0 has one$"):
        Hosts(1, 3).same("data", "one")


def test_flags_come_before_the_environment():
    environment = {"JAX_COORDINATOR_ADDRESS": "there:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert asked(False, environment=environment) is None
    assert asked(True, environment={}) == (None, None, None, 20)
    assert asked(True, environment=environment) == ("there:1", 4, 3, 20)
    assert asked(True, "[::1]:99", 2, 0, 7, environment) == ("[::1]:99", 2, 0, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((False, "here:1"), "--coordinator, --processes, --process-id and --heartbeat need --distributed"),
        ((False, None, None, 0), "need --distributed"),
        ((False, None, None, None, 9), "need --distributed"),
        ((True, "here"), "--coordinator here must be HOST:PORT"),
        ((True, "here:0"), "a port from 1 to 65535"),
        ((True, "here:99999"), "a port from 1 to 65535"),
        ((True, "::1:99"), "must be HOST:PORT"),
        ((True, ":99"), "must be HOST:PORT"),
        ((True, "here:1", 2, 2), "--process-id 2 must be between 0 and 1"),
        ((True, "here:1", 2, -1), "--process-id -1 must be between 0 and 1"),
        ((True, "here:1", 0, 0), "--processes 0 must be between 1 and"),
        ((True, "here:1", 2, 0, 1), "--heartbeat 1 must be between 5 and 3600 seconds"),
        ((True, "here:1", None, 0, None, {"JAX_NUM_PROCESSES": "two"}), "JAX_NUM_PROCESSES=two is no number"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        asked(*arguments)


SCRIPT = """
import os, signal, sys, time
from cnnlib.system import signals as stopping
from cnnlib.train import multihost, sharding as mesh
from cnnlib.errors import UserError

what, coordinator, count, process, chosen = sys.argv[1], *(int(a) if a.isdecimal() else a for a in sys.argv[2:])
status = 0
try:
    mesh.use_cores(1 + process if what == "devices" else 2)
    cluster = multihost.asked(True, coordinator, count, process, 8)
    with stopping.by_signal() as wish, multihost.join(cluster, seconds=100) as own:
        long = bytes([process]) * (3000 * process)
        told = [own.gathered(long) == [bytes([i]) * (3000 * i) for i in range(count)]]
        told += [own.from_first(b"hello" if process == 0 else None), own.agreed(process == 1), own.agreed(False)]
        print("told", *told, own.lowest(2**40 - process) == 2**40 - count + 1, flush=True)
        own.same("version", "other" if what == "differs" and process == 1 else "same")
        if what == "fails" and process == chosen:
            raise UserError("the disk is full")
        if what == "signal":
            if process == chosen:
                os.kill(os.getpid(), signal.SIGTERM)
            while not own.agreed(wish.is_made()):
                time.sleep(0.05)
        if what in ("killed", "fails"):
            while True:
                own.agreed(False)
                time.sleep(0.05)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    status = 2
sys.stdout.flush()
os._exit(status)
"""


def free_port():
    with socket.create_server((ADDRESS, 0)) as server:
        return server.getsockname()[1]


def started(what, count=2, chosen=0):
    """Start the processes of the script."""
    coordinator = f"{ADDRESS}:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-u", "-c", SCRIPT, what, coordinator, str(count), str(process), str(chosen)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(count)
    ]


def ended(processes):
    """Return the status, the last line of standard output and our line on standard error of each process."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=180)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        found.append((process.returncode, (out.splitlines() or [""])[-1], "\n".join(lines)))
    return found


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_are_told_the_same_and_end(count):
    assert ended(started("ends", count)) == [(0, "told True b'hello' True False True", "")] * count


@pytest.mark.slow
def test_a_process_that_differs_is_named_by_all():
    line = "error: process 1 of 2: version other, process 0 has same"
    assert [(status, error) for status, _, error in ended(started("differs"))] == [(2, line)] * 2


@pytest.mark.slow
def test_hosts_with_different_devices_are_told_how_many_to_use():
    line = "error: the hosts have 1, 2 devices; all need equally many: devices=1"
    assert [(status, error) for status, _, error in ended(started("devices"))] == [(2, line)] * 2


@pytest.mark.slow
def test_a_signal_is_still_a_wish_to_stop():
    assert [status for status, *_ in ended(started("signal", chosen=1))] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [0, 1])
def test_an_error_of_one_process_ends_the_others(chosen):
    found = ended(started("fails", 3, chosen))
    assert found[chosen][0] == 2 and found[chosen][2] == "error: the disk is full"
    assert all(status != 0 for status, *_ in found)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])  # process 0 is where all meet
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_within_a_minute_of_a_process_that_dies_or_is_silent(victim, how):
    processes = started("killed", 3, victim)
    for process in processes:
        while not process.stdout.readline().startswith("told"):
            assert process.poll() is None
    began = time.monotonic()
    processes[victim].send_signal(how)
    others = [process for number, process in enumerate(processes) if number != victim]
    try:
        found = ended(others)
        assert time.monotonic() - began < 60
    finally:
        processes[victim].kill()
        processes[victim].communicate()
    for status, _, error in found:
        # On a CPU a computation with a dead process fails at once. Otherwise JAX aborts the process.
        assert status == 2 or "has ended" not in error
        assert status != 0
    if how == signal.SIGKILL and victim == 1:
        assert any("another process of the run has ended" in error and "--resume" in error for *_, error in found)


JOIN = """
import os, sys
from cnnlib.train import multihost
from cnnlib.errors import UserError
a = [int(a) if a.isdecimal() else None if a == "-" else a for a in sys.argv[1:]]
try:
    multihost.join(multihost.asked(True, *a), seconds=10)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    os._exit(2)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("127.0.0.1:{port} 2 1", "the processes did not find each other within 10 s: "),
        ("127.0.0.1:{port} 2 0", "the processes did not find each other within 10 s: "),
        ("127.0.0.1:{port} 2 -", "JAX finds no cluster here that tells --process-id: "),
        ("- - -", "JAX finds no cluster here that tells --coordinator, --processes, --process-id: "),
    ],
)
def test_what_does_not_come_together_is_one_line(arguments, message):
    command = [sys.executable, "-c", JOIN, *arguments.format(port=free_port()).split()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
