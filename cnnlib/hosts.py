"""The processes of one run on several hosts, one a host, and what they tell each other that no device computes.

Process 0 is the middle of a star: each other process has two connections to it. On one they call: all processes call
the same methods in the same order, a call waits for all of them, and one that is out of step is an error. The other is
a lifeline: a beat a second, the reason where one gives up, and silence or its end where a process is no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cnnlib.errors import Stopped, UserError

PATIENCE = 20.0
"""Seconds without a beat after which a process is taken for lost; a killed one is noticed at once."""
GRACE = 5.0
"""Seconds a process may be stuck, such as in a device's computation with a lost one, before its watch ends it."""
LEAVING = 30.0
"""Seconds a process has to end once it knows that the run does."""
ENDING = 600.0
"""Seconds a process that is done waits for the others to be."""
BEAT = 1.0
MOST_BYTES = 1 << 36
"""Of one message."""
MOST_TEXT = 4096
ALIGNMENT = 16
"""Bytes. Each array of a message begins at a multiple of it."""
GO_ON = "what is saved can be gone on with by --resume on all hosts"
HEADER = struct.Struct("!IBQ")
"""Of a message: the number of the call, the lengths of the call's name and of what is said."""


class HostLost(UserError):
    """Another process of the run has died, is silent, or has ended with the error that the message tells."""


class OutOfStep(RuntimeError):
    """Two processes called different methods: a mistake in the program."""


class Peer(NamedTuple):
    """Another process, and the two connections to it."""

    name: str
    calls: socket.socket
    line: socket.socket


class Watch:
    """A thread that keeps the lifelines, and ends the process where the run has ended and its main thread is stuck."""

    def __init__(self, peers: list[Peer], last_words: list[Callable[[str], None]]) -> None:
        self.heeded, self.over = threading.Event(), threading.Event()
        self._peers, self._last_words = peers, last_words
        self._text, self._noted, self._since = "", threading.Event(), 0.0
        self._answered = {peer: threading.Event() for peer in peers}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        if peers:
            self._thread.start()

    def lost(self, seconds: float) -> str | None:
        """Why the run has ended; None where nothing is known of it, and within so many seconds nothing is heard."""
        if not self._peers or not self._noted.wait(seconds):
            return None
        self.heeded.set()
        return self._text

    def tell(self, text: str) -> None:
        """Ends the run on all, and waits until they know: who ends first might take back what is under way."""
        self._note(text)
        until = time.monotonic() + 3 * BEAT
        for answered in self._answered.values():
            answered.wait(max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """Ends the watch."""
        self.over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _note(self, text: str) -> None:
        with self._lock:
            if self._noted.is_set() or self.over.is_set():
                return
            self._text, self._since = " ".join(text.split())[:MOST_TEXT], time.monotonic()
            self._noted.set()
        for peer in self._peers:
            self._send(peer, self._text.encode() + b"\n")
            with contextlib.suppress(OSError):  # no longer connected
                peer.calls.shutdown(socket.SHUT_RDWR)  # wakes the main thread, which may wait for it

    def _send(self, peer: Peer, line: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):  # where it is gone, its line's end or its silence tells so
            peer.line.sendall(line)

    def _keep(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        rest = dict.fromkeys(self._peers, b"")
        beaten = 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.line, selectors.EVENT_READ, peer)
            while not self.over.is_set():
                for key, _ in selector.select(BEAT / 4):
                    peer = key.data
                    if said := _received(peer.line):
                        heard[peer] = time.monotonic()
                        *lines, rest[peer] = (rest[peer] + said).split(b"\n")
                        reasons = [line.decode(errors="replace") for line in lines if line]
                    else:
                        selector.unregister(peer.line)
                        del heard[peer]
                        reasons = [f"{peer.name} has died; {GO_ON}"]
                    for reason in reasons:
                        self._note(reason)
                        self._answered[peer].set()
                now = time.monotonic()
                for peer in [peer for peer, last in heard.items() if now - last > PATIENCE]:
                    self._note(f"{peer.name} has not been heard of for {PATIENCE:.0f} s; {GO_ON}")
                if now - beaten >= BEAT:
                    beaten = now
                    for peer in heard:
                        self._send(peer, b"\n")
                if self._noted.is_set() and now - self._since > (LEAVING if self.heeded.is_set() else GRACE):
                    # What is stuck may be stuck for ever, and so may be what it wanted to say.
                    words = threading.Thread(target=self._say_last_words, daemon=True)
                    words.start()
                    words.join(LEAVING)
                    return None if self.over.is_set() else leave(self._text)
        return None

    def _say_last_words(self) -> None:
        for word in self._last_words:
            word(self._text)


class Hosts:
    """This process, `process` of `count`, among the others; `with hosts:` ends the run on all where it ends on one.

    Its methods are for one thread, and raise HostLost once a process is lost. Where that thread does not come by for
    `GRACE`, the `last_words` are called with the reason, and the process ends with status 2 and that one line.
    """

    def __init__(self, process: int = 0, count: int = 1, peers: Mapping[int, Peer] | None = None) -> None:
        self.process, self.count = process, count
        self.last_words: list[Callable[[str], None]] = []
        self._peers = [peer for _, peer in sorted((peers or {}).items())]
        self._watch = Watch(self._peers, self.last_words)
        self._calls = 0
        self.keeper: subprocess.Popen[bytes] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes, and tells the user."""
        return self.process == 0

    def from_first(self, value: bytes | None) -> bytes:
        """What process 0 gives, on all; what others give is not looked at."""
        if self.is_first and value is None:
            raise ValueError("process 0 gives nothing")
        return bytes(self._call("from_first", (), lambda _: [value or b""]))

    def agreed(self, wish: bool) -> bool:
        """True on all as soon as one of them wishes it."""
        return self._lowest("agreed", 0 if wish else 1) == 0

    def lowest(self, number: int) -> int:
        """The lowest of what they give, on all."""
        return self._lowest("lowest", number)

    def _lowest(self, name: str, number: int) -> int:
        return int(self._call(name, [b"%d" % number], lambda told: [b"%d" % min([number, *map(int, told)])]))

    def gathered(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """The arrays of every process, on every process, by process; their numbers, shapes and dtypes may differ."""
        own = packed([arrays])
        return unpacked(self._call("gathered", own, lambda told: packed([arrays, *(unpacked(one)[0] for one in told)])))

    def gathered_by_first(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]] | None:
        """The arrays of every process by process, on process 0; None on the others."""
        found = [list(arrays)]

        def keep(told: list[bytearray]) -> Parts:
            found.extend(unpacked(one)[0] for one in told)
            return ()

        self._call("gathered_by_first", () if self.is_first else packed([arrays]), keep)
        return found if self.is_first else None

    def same(self, what: str, value: str) -> None:
        """Raises UserError on all, saying who differs from process 0 and how, unless they all give the same."""

        def differing(told: list[bytearray]) -> Parts:
            pairs = zip(self._peers, (one.decode() for one in told), strict=True)
            found = [f"{peer.name}: {what} {other}, process 0 has {value}" for peer, other in pairs if other != value]
            return ["; ".join(found).encode()]

        if found := self._call(f"same {what}", [value.encode()], differing):
            with contextlib.suppress(HostLost):  # who goes first ends the others, and by then they are to know this
                self._call("same, known", (), lambda _: ())
            raise UserError(found.decode())

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, Stopped):
            self.close(None)
        elif isinstance(error, (UserError, OutOfStep)):
            self.close(str(error))
        else:
            # A device's computation with a lost process fails sooner than the loss is known, and says less.
            lost = self._watch.lost(5 * BEAT)
            self.close(f"unexpected {type(error).__name__}: {error}")
            if lost is not None:
                raise HostLost(lost) from error

    def close(self, failure: str | None) -> None:
        """Tells the others why this process ends, or waits until all are done; leave with `os._exit` then.

        Never with `jax.distributed.shutdown`, which waits for the dead as well. Process 0 waits until the others are
        gone, since JAX ends them when it goes. Raises HostLost where a process is lost before it is done.
        """
        if self._watch.over.is_set() or not self._peers:
            return
        if failure is not None:
            self._watch.heeded.set()
            self._watch.tell(f"{name_of(self.process, self.count, identity())}: {failure}")
            self._watch.stop()
        else:
            self._finish()
        for peer in self._peers if self.is_first else ():
            peer.calls.close()
        for peer in self._peers:
            peer.line.close()
        UNTIL_THE_END.extend(peer.calls for peer in self._peers)

    def _finish(self) -> None:
        def all_done(_: list[bytearray]) -> Parts:
            self._watch.over.set()  # before the others know that they may go
            return ()

        for peer in self._peers:
            peer.calls.settimeout(ENDING)
        self._call("close", (), all_done)
        self._watch.stop()
        if self.is_first:
            until = time.monotonic() + LEAVING
            for peer in self._peers:
                peer.calls.settimeout(max(0.01, until - time.monotonic()))
                try:
                    rest = peer.calls.recv(1)
                except TimeoutError as error:
                    raise HostLost(f"{peer.name} is done, and does not end") from error
                except OSError:  # it did end
                    rest = b""
                if rest:
                    raise OutOfStep(f"{peer.name} goes on after the end")
            if self.keeper is not None:
                self.keeper.communicate(b"done\n")

    def _call(self, name: str, own: Parts, answer: Callable[[list[bytearray]], Parts]) -> bytearray:
        """What process 0 makes of what the others say; it has its own at hand."""
        self._calls += 1
        if self.is_first:
            reply = answer([self._heard(peer, name) for peer in self._peers])
            for peer in self._peers:
                self._say(peer, name, reply)
            return bytearray().join(reply)
        self._say(self._peers[0], name, own)
        return self._heard(self._peers[0], name)

    def _say(self, peer: Peer, name: str, parts: Parts) -> None:
        header = HEADER.pack(self._calls, len(name.encode()), sum(map(len, parts)))
        try:
            for part in (header + name.encode(), *parts):
                peer.calls.sendall(part)
        except OSError as error:
            raise self._lost(peer, error) from error

    def _heard(self, peer: Peer, name: str) -> bytearray:
        try:
            call, letters, size = HEADER.unpack(exactly(peer.calls, HEADER.size))
            theirs = exactly(peer.calls, letters).decode(errors="replace")
            if (call, theirs) != (self._calls, name) or size > MOST_BYTES:
                raise OutOfStep(f"{peer.name} is at its call {call}, {theirs!r}; here it is {self._calls}, {name!r}")
            return exactly(peer.calls, size)
        except OSError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: Peer, error: OSError) -> HostLost:
        if isinstance(error, TimeoutError):
            return HostLost(f"{peer.name} is not done {ENDING:.0f} s after this one")
        return HostLost(self._watch.lost(5 * BEAT) or f"the connection to {peer.name} is broken: {error}")


ALONE = Hosts()
"""The only process of a run."""
UNTIL_THE_END: list[socket.socket] = []
"""What process 0 sees closed when this process is gone."""
Parts = Sequence[bytes | memoryview]
"""What is sent as one; the lengths are in bytes."""


def packed(groups: Sequence[Sequence[np.ndarray]]) -> Parts:
    """Arrays as bytes: what they are, in JSON, and their numbers. Raises TypeError for arrays of anything else."""
    kinds: list[list[Any]] = []
    parts: list[bytes | memoryview] = []
    for group in groups:
        for array in group:
            if not is_numeric(array.dtype):
                raise TypeError(f"only numbers can be sent, not {array.dtype}")
            numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            parts += [numbers, bytes(-len(numbers) % ALIGNMENT)]
        # What extends NumPy, such as bfloat16, is known by its name alone.
        kinds.append([[a.dtype.name if a.dtype.kind == "V" else a.dtype.str, a.shape] for a in group])
    header = json.dumps(kinds).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    return [struct.pack("!Q", len(header)), header, *parts]


def unpacked(said: bytearray) -> list[list[np.ndarray]]:
    """View the arrays that `packed` made these bytes of, in their memory.

    Raises UserError where they are no arrays of numbers, or do not fit the bytes: an array of objects would take the
    bytes of another process for pointers.
    """
    groups: list[list[np.ndarray]] = []
    try:
        (length,) = struct.unpack_from("!Q", said)
        start = 8 + length
        for kinds in json.loads(said[8:start]):
            groups.append([])
            for name, shape in kinds:
                dtype = np.dtype(name)
                if not is_numeric(dtype) or min(shape, default=0) < 0:
                    raise ValueError(f"dtype {dtype}, shape {shape}")
                array = np.ndarray(shape, dtype, said, start)  # raises where these bytes are too few
                groups[-1].append(array)
                start += array.nbytes + -array.nbytes % ALIGNMENT
    except (struct.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"another process sent something other than arrays of numbers: {error}") from error
    return groups


def is_numeric(dtype: np.dtype) -> bool:
    """Whether a dtype is boolean, a number of NumPy's, or one that extends NumPy, such as bfloat16."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.type is not np.void)


def _received(connection: socket.socket) -> bytes:
    """What has come; nothing where nothing will come any more."""
    try:
        return connection.recv(1 << 16)
    except OSError:  # a process that dies may reset it
        return b""


def exactly(connection: socket.socket, count: int) -> bytearray:
    """The next so many bytes; raises ConnectionError where fewer come."""
    room = bytearray(count)
    view = memoryview(room)
    while view:
        if not (number := connection.recv_into(view)):
            raise ConnectionError("closed")
        view = view[number:]
    return room


def identity() -> str:
    """What a user finds this process by."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def name_of(process: int, count: int, identity: str) -> str:
    """A process as messages name it."""
    return f"process {process} of {count} ({identity})"


def leave(text: str) -> None:
    """Ends the process with the one line, whatever its threads do."""
    with contextlib.suppress(OSError):  # nobody there to read it
        os.write(sys.stderr.fileno(), f"error: {text}\n".encode())
    os._exit(2)
