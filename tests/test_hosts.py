"""The processes of a run on several hosts: as threads where they only talk, as processes where they compute and die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cnnlib import hosts
from cnnlib.errors import Stopped, UserError
from cnnlib.meeting import Meeting, asked, listen, meet

pytestmark = pytest.mark.once

ADDRESS = "127.0.0.1"


@pytest.fixture
def star(monkeypatch):
    """Runs `talk(hosts)` in as many threads, each as a process, and returns what they return or raise."""
    ended = []
    monkeypatch.setattr(hosts, "leave", ended.append)
    monkeypatch.setattr(hosts, "UNTIL_THE_END", [])
    made = []

    def run(count, talk, before=lambda meeting: None):
        listener = listen()
        meeting = Meeting([ADDRESS], listener.getsockname()[1], "secret")

        def one(process):
            own = meet(process, count, meeting, listener if process == 0 else None, 10)
            made.append(own)
            try:
                return talk(own)
            except Exception as error:
                return error
            finally:
                if process:  # as when a process is gone
                    for peer in own._peers:
                        peer.calls.close()

        with listener, ThreadPoolExecutor(count) as pool:
            first = pool.submit(one, 0)
            before(meeting)
            return [future.result() for future in [first, *(pool.submit(one, process) for process in range(1, count))]]

    yield SimpleNamespace(run=run, ended=ended)
    for own in made:
        own._watch.stop()
        for peer in own._peers:
            peer.line.close()
            peer.calls.close()


def test_a_process_alone_has_no_sockets_and_agrees_with_itself():
    with hosts.ALONE as alone:
        assert alone.is_first and (alone.process, alone.count) == (0, 1)
        assert alone.from_first(b"text") == b"text"
        assert alone.agreed(True) and not alone.agreed(False)
        assert alone.lowest(7) == 7
        alone.same("jax", "0.10")
        arrays = [np.arange(3.0), np.array(1)]
        for (found,) in (alone.gathered(arrays), alone.gathered_by_first(arrays)):
            assert all(np.array_equal(own, other) for own, other in zip(arrays, found, strict=True))
    with pytest.raises(ValueError, match="gives nothing"):
        alone.from_first(None)


@pytest.mark.parametrize("count", [2, 3])
def test_all_are_told_the_same(star, count):
    def talk(own):
        with own:
            told = [own.from_first(b"from %d" % own.process)]
            told += [own.agreed(own.process == count - 1), own.agreed(False), own.lowest(10 - own.process)]
            own.same("jax", "0.10")
            return told

    assert star.run(count, talk) == [[b"from 0", True, False, 11 - count]] * count
    assert not star.ended


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(3, np.int64),
    np.zeros((0, 5), np.uint8),
    np.array([True, False, True]),
    np.array([1.5, -2.0], ml_dtypes.bfloat16),
    np.arange(12, dtype=">i2").reshape(3, 4).T,
    np.array([1 + 2j], np.complex64),
]


def test_arrays_of_any_kind_and_shape_are_gathered_by_process(star):
    def own_arrays(process):
        return [np.roll(array, process) for array in ARRAYS[process:]]

    def talk(own):
        with own:
            arrays = own_arrays(own.process)
            return own.gathered(arrays), own.gathered_by_first(arrays), own.gathered([])

    for process, (everyone, by_first, none) in enumerate(star.run(3, talk)):
        assert (by_first is None) == (process > 0) and none == [[], [], []]
        for found in [everyone] if by_first is None else [everyone, by_first]:
            assert len(found) == 3
            for other, arrays in enumerate(found):
                for array, expected in zip(arrays, own_arrays(other), strict=True):
                    assert array.dtype == expected.dtype and array.shape == expected.shape
                    assert np.array_equal(array, expected) and array.flags.aligned


def test_a_large_array_is_gathered(star):
    def talk(own):
        with own:
            return own.gathered_by_first([np.full(3_000_000, own.process)])

    (first, *others) = star.run(3, talk)
    assert [[(array == process).all() for array in one] for process, one in enumerate(first)] == [[True]] * 3
    assert others == [None, None]


@pytest.mark.parametrize("array", [np.array([{}]), np.array(["text"]), np.array([(1, {})], "i4,O")])
def test_only_numbers_are_sent(array):
    with pytest.raises(TypeError, match="only numbers"):
        hosts.packed([[array]])


def message(kinds, numbers=bytes(64)):
    """The bytes of arrays that are described like this."""
    header = kinds if isinstance(kinds, bytes) else json.dumps(kinds).encode()
    return bytearray(struct.pack("!Q", len(header)) + header + numbers)


@pytest.mark.parametrize(
    "said",
    [
        message([[["|O", [2]]]]),  # pointers, to wherever the other process likes
        message([[["|O", [0]]]]),
        message([[["<i4,|O", [1]]]]),
        message([[[[["a", "|O"]], [1]]]]),
        message([[["|V8", [1]]]]),
        message([[["<U2", [1]]]]),
        message([[["<M8[s]", [1]]]]),
        message([[["nothing", [1]]]]),
        message([[["<f4", [17]]]]),  # more than came
        message([[["<f4", [-1]]]]),
        message([[["<f4", [-1, -16]]]]),
        message([[["<f4", [0, 2**62]]]]),
        message([[["<f4", [2**62, 4]]]]),
        message([[["<f4", [2**70]]]]),
        message([[["<f4", [1] * 100]]]),
        message([[["<f4", [1.5]]]]),
        message([[["<f4", "ab"]]]),
        message([[["<f4"]]]),
        message(5),
        message({"a": [1]}),
        message(b"\xff"),
        message(b"[" * 100_000),
        bytearray(5),
        bytearray(struct.pack("!Q", 2**63)),
    ],
)
def test_what_holds_no_numbers_or_does_not_fit_is_not_taken(said):
    with pytest.raises(UserError, match=r"^another process sent something other than arrays of numbers: [^\n]+$"):
        hosts.unpacked(said)


def test_a_process_that_sends_pointers_ends_the_run(star, monkeypatch):
    def talk(own):
        with own:
            if own.process == 1:
                monkeypatch.setattr(hosts, "packed", lambda groups: [bytes(message([[["|O", [1]]]]))])
            return own.gathered_by_first([np.zeros(1)])

    first, _ = star.run(2, talk)
    assert isinstance(first, UserError) and "other than arrays of numbers" in str(first)


def test_who_differs_from_the_first_is_named_on_all(star):
    def talk(own):
        with own:
            own.same("jax", "0.10.2")
            own.same("data", "other" if own.process == 2 else "same")

    pattern = r"process 2 of 3 \(pid \d+ on \S+\): data other, process 0 has same"
    for error in star.run(3, talk):
        assert type(error) is UserError and re.fullmatch(pattern, str(error))


@pytest.mark.parametrize("is_first", [True, False])
def test_out_of_step_is_an_error_on_all(star, is_first):
    def talk(own):
        with own:
            own.agreed(False)
            return own.agreed(False) if own.is_first == is_first else own.from_first(b"")

    first, *others = star.run(3, talk)
    assert isinstance(first, hosts.OutOfStep)
    assert re.match(r"process 1 of 3 \(.*\) is at its call 2, '\w+'; here it is 2, '\w+'", str(first))
    for error in others:
        assert isinstance(error, hosts.HostLost) and "process 0 of 3" in str(error) and str(first) in str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_is_told_by_all(star, failing):
    def talk(own):
        with own:
            if own.process == failing:
                raise UserError("the disk\nis full")
            own.agreed(False)

    for process, error in enumerate(star.run(3, talk)):
        if process == failing:
            assert type(error) is UserError
        else:
            assert isinstance(error, hosts.HostLost)
            assert re.fullmatch(rf"process {failing} of 3 \(pid \d+ on \S+\): the disk is full", str(error))


def test_one_that_is_gone_is_named_by_all_and_goes_before_what_it_broke(star):
    def talk(own):
        with own:
            if own.process == 1:
                own._watch.over.set()  # says no more
                for peer in own._peers:
                    peer.line.shutdown(socket.SHUT_RDWR)
                return None
            if own.process == 2:
                raise RuntimeError("Gloo all-reduce failed")
            return own.agreed(False)

    first, _, last = star.run(3, talk)
    for error in (first, last):
        assert isinstance(error, hosts.HostLost)
        assert re.fullmatch(r"process 1 of 3 \(pid \d+ on \S+\) has died; .* --resume on all hosts", str(error))
    assert isinstance(last.__cause__, RuntimeError)


def test_a_wish_to_stop_that_all_have_is_a_normal_end(star):
    began = time.monotonic()

    def talk(own):
        try:
            with own:
                time.sleep(own.process / 2)
                raise Stopped("after epoch 1")
        except Stopped:
            return time.monotonic() - began

    assert min(star.run(2, talk)) >= 0.5  # who is done waits for who is not
    assert not star.ended


def test_one_that_is_silent_or_stuck_ends_the_others_with_their_last_words(star, monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE", 1.2)
    monkeypatch.setattr(hosts, "GRACE", 0.5)
    words = []

    def talk(own):
        if own.process == 1:
            own._watch.stop()
            time.sleep(2.5)
            return
        own.last_words.append(words.append)
        own._watch._thread.join(10)  # stuck, where no call would tell it

    began = time.monotonic()
    star.run(2, talk)
    assert time.monotonic() - began < 10
    (text,) = star.ended
    assert re.match(r"process 1 of 2 \(.*\) has not been heard of for 1 s", text) and words == [text]


def test_strangers_are_refused_and_the_run_goes_on(star):
    refused = []

    def intrude(meeting):
        def knock(said):
            with socket.create_connection((ADDRESS, meeting.port), timeout=10) as stranger:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                got = b""
                try:
                    while piece := stranger.recv(4096):
                        got += piece
                except ConnectionResetError:
                    pass
                refused.append(len(got))

        knock(b"")
        knock(b"GET / HTTP/1.1\r\n\r\n" * 10)
        # One that knows all but the token, and listens to what comes back.
        with pytest.raises(UserError, match="process 0 is not reached"):
            meet(1, 2, meeting._replace(token="guessed"), None, 0.3)

    def talk(own):
        with own:
            return own.agreed(own.process == 1)

    assert star.run(2, talk, intrude) == [True, True]
    assert refused == [16, 16]  # a challenge, and no word more


def test_who_is_missing_is_named():
    with listen() as listener, pytest.raises(UserError, match=r"process 1, 2 did not connect within 0 s"):
        meet(0, 3, Meeting([ADDRESS], 0, "secret"), listener, 0.1)


def test_nobody_to_reach_is_one_line():
    with listen() as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match=rf"process 0 is not reached at port {port}: {ADDRESS}: "):
        meet(1, 2, Meeting([ADDRESS], port, "secret"), None, 0.1)


def test_flags_come_before_the_environment():
    environment = {"JAX_COORDINATOR_ADDRESS": "there:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert asked(False, environment=environment) is None
    assert asked(True, environment={}) == (None, None, None)
    assert asked(True, environment=environment) == ("there:1", 4, 3)
    assert asked(True, "[::1]:99", 2, 0, environment) == ("[::1]:99", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((False, "here:1"), "have no meaning without --distributed"),
        ((False, None, None, 0), "have no meaning without --distributed"),
        ((True, "here"), "--coordinator here must be HOST:PORT"),
        ((True, "here:0"), "a port from 1 to 65535"),
        ((True, "here:99999"), "a port from 1 to 65535"),
        ((True, "::1:99"), "must be HOST:PORT"),
        ((True, ":99"), "must be HOST:PORT"),
        ((True, "here:1", 2, 2), "--process-id 2 must be between 0 and 1"),
        ((True, "here:1", 2, -1), "--process-id -1 must be between 0 and 1"),
        ((True, "here:1", 0, 0), "--processes 0 must be between 1 and"),
        ((True, "here:1", None, 0, {"JAX_NUM_PROCESSES": "two"}), "JAX_NUM_PROCESSES=two is no number"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        asked(*arguments)


SCRIPT = """
import os, signal, sys, time
import numpy as np
from cnnlib import meeting, mesh, stopping
from cnnlib.errors import UserError

what, coordinator, count, process, chosen = sys.argv[1], *(int(a) if a.isdecimal() else a for a in sys.argv[2:])
if what == "dies early" and process == chosen:
    meeting._from_first_device = lambda own: os.kill(os.getpid(), signal.SIGKILL)
status = 0
try:
    mesh.use_cores(1 + process)  # as different as hosts may be
    asked = meeting.asked(True, coordinator, count, process)
    with stopping.by_signal() as wish, meeting.join(*asked, seconds=100) as own:
        told = [own.from_first(b"hello" if process == 0 else None), own.agreed(process == 1), own.agreed(False)]
        own.same("version", "other" if what == "differs" and process == chosen else "same")
        rows = own.gathered([np.full((process, 2), process, np.float32)])
        print("told", *told, [array.tolist() for (array,) in rows], flush=True)
        if what == "fails" and process == chosen:
            raise UserError("the disk is full")
        if what == "signal":
            if process == chosen:
                os.kill(os.getpid(), signal.SIGTERM)
            while not own.agreed(wish.is_made()):
                time.sleep(0.05)
        if what == "computes" and process != chosen:
            meeting._from_first_device(b"")
        if what in ("computes", "sleeps"):
            time.sleep(100)
        if what not in ("ends", "signal"):
            own.agreed(False)
            time.sleep(100 if process == chosen else 0)
            own.agreed(False)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    status = 2
sys.stdout.flush()
os._exit(status)
"""


def free_port():
    with socket.create_server((ADDRESS, 0)) as server:
        return server.getsockname()[1]


class Run:
    """Processes of the script, what they have said so far, and when they ended."""

    def __init__(self, what, count, chosen=0):
        coordinator = f"{ADDRESS}:{free_port()}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-u", "-c", SCRIPT, what, coordinator, str(count), str(process), str(chosen)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for process in range(count)
        ]
        self.said, self.errors, self.ended = [""] * count, [""] * count, [0.0] * count
        self.told = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._read, args=(process,)) for process in range(count)]
        self._threads += [threading.Thread(target=self._read_errors, args=(process,)) for process in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self, process):
        for line in self.processes[process].stdout:
            self.said[process] += line
            if line.startswith("told"):
                self.told[process].set()
        self.processes[process].wait()
        self.ended[process] = time.monotonic()
        self.told[process].set()

    def _read_errors(self, process):
        for line in self.processes[process].stderr:
            self.errors[process] += line

    def wait_told(self):
        for told in self.told:
            assert told.wait(120)

    def ends(self, seconds=180):
        """The statuses."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        finally:
            self.stop()

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for thread in self._threads:
            thread.join()
        for process in self.processes:
            process.stdout.close()
            process.stderr.close()

    def lines(self, process):
        """Of ours, on standard error: those of JAX begin otherwise."""
        return [line for line in self.errors[process].splitlines() if line.startswith("error: ")]


def all_words():
    """Of the command lines of all processes."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found |= set(place.read_text(errors="replace").split("\0"))
    return found


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_with_different_devices_find_and_tell_each_other_and_end(count):
    run = Run("ends", count)
    assert run.ends() == [0] * count
    rows = json.dumps([[[float(process)] * 2] * process for process in range(count)])
    for process in range(count):
        assert f"told b'hello' True False {rows}\n" in run.said[process]
        assert not run.lines(process)
    assert f"connections-of-{run.processes[0].pid}" not in all_words()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["waits", "computes", "sleeps"])
@pytest.mark.parametrize("victim", [0, 1])  # the first is where all meet; the others are alike
def test_a_killed_process_is_named_by_the_others_wherever_they_are(what, victim):
    run = Run(what, 3, victim)
    run.wait_told()
    time.sleep(0.5)
    began = time.monotonic()
    run.processes[victim].kill()
    statuses = run.ends()
    for process in {0, 1, 2} - {victim}:
        assert statuses[process] == 2
        (line,) = run.lines(process)
        assert re.match(rf"error: process {victim} of 3 \(pid {run.processes[victim].pid} on \S+\) has died; ", line)
        assert "Check failure" not in run.errors[process] and "Terminating" not in run.errors[process]
        assert run.ended[process] - began < hosts.GRACE + 20  # not the 100 s that it would sleep


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_is_silent_is_named_in_time(victim):
    run = Run("waits", 3, victim)
    run.wait_told()
    began = time.monotonic()
    run.processes[victim].send_signal(signal.SIGSTOP)
    others = sorted({0, 1, 2} - {victim})
    try:
        statuses = [run.processes[process].wait(120) for process in others]
    finally:
        run.stop()
    assert statuses == [2, 2]
    for process in others:
        (line,) = run.lines(process)
        assert re.match(rf"error: process {victim} of 3 \(.*\) has not been heard of for 20 s; ", line)
        assert hosts.PATIENCE - 5 < run.ended[process] - began < hosts.PATIENCE + 20


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [0, 1])
def test_an_error_of_one_process_is_what_all_say(chosen):
    run = Run("fails", 3, chosen)
    assert run.ends() == [2, 2, 2]
    for process in range(3):
        (line,) = run.lines(process)
        told = "error: " if process == chosen else rf"error: process {chosen} of 3 \(pid \d+ on \S+\): "
        assert re.fullmatch(told + "the disk is full", line)


@pytest.mark.slow
def test_a_process_that_differs_is_named_by_all():
    run = Run("differs", 2, 1)
    assert run.ends() == [2, 2]
    for process in range(2):
        assert re.fullmatch(
            r"error: process 1 of 2 \(pid \d+ on \S+\): version other, process 0 has same", *run.lines(process)
        )


@pytest.mark.slow
def test_a_signal_is_still_a_wish_to_stop():
    run = Run("signal", 2, 1)
    assert run.ends() == [0, 0]
    assert "stopping at the end of this epoch" in run.errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_while_they_find_each_other_leaves_nobody_waiting_for_ever(victim):
    run = Run("dies early", 2, victim)
    statuses = run.ends()
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] != 0


JOIN = """
import os, sys
from cnnlib import meeting
from cnnlib.errors import UserError
a = [int(a) if a.isdecimal() else None if a == "-" else a for a in sys.argv[1:]]
try:
    meeting.join(*meeting.asked(True, *a), seconds=10)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    os._exit(2)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("127.0.0.1:{port} 2 1", "process 0 is not reached at --coordinator 127.0.0.1:{port} within 9 s: "),
        ("127.0.0.1:{port} 2 0", "the processes did not find each other within 10 s: "),
        ("127.0.0.1:{taken} 2 0", "--coordinator: port {taken} is in use"),
        ("127.0.0.1:{port} 2 -", "JAX finds no cluster here that tells --process-id: "),
        ("- - -", "JAX finds no cluster here that tells --coordinator, --processes, --process-id: "),
    ],
)
def test_what_does_not_come_together_is_one_line(arguments, message):
    with socket.create_server(("", 0)) as server:
        ports = {"port": free_port(), "taken": server.getsockname()[1]}
        command = [sys.executable, "-c", JOIN, *arguments.format(**ports).split()]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {message.format(**ports)}")


@pytest.mark.slow
def test_processes_that_count_differently_are_named():
    coordinator = f"{ADDRESS}:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    script = JOIN.replace("seconds=10", "seconds=60")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, coordinator, count, process],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for count, process in (("2", "0"), ("3", "1"))
    ]
    for process in processes:
        _, told = process.communicate(timeout=180)
        assert process.returncode == 2
        assert re.match(r"error: process 1 of 2 \(.*\): --processes 3, process 0 has 2", told.splitlines()[-1])
