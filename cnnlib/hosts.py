"""The processes of one run on several hosts, one a host, and what they tell each other that no device computes.

Process 0 is the middle of a star: each other process has two connections to it. On one they call: all processes call
the same methods in the same order, a call waits for all of them, and one that is out of step is an error. The other is
a lifeline: a beat a second, the reason where one gives up, and silence or its end where a process is no more.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cnnlib.errors import Stopped, UserError

START = 300.0
"""Seconds the processes have to find each other."""
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
ROW = 1024
"""Bytes that process 0 tells the others over JAX: where it listens."""
GO_ON = "what is saved can be gone on with by --resume on all hosts"
HEADER = struct.Struct("!IBQ")
"""Of a message: the number of the call, the lengths of the call's name and of what is said."""
PROVEN = struct.Struct("!32sH")
"""Of a text between strangers: the proof that the token is known, the length of the text."""


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
        self._keeper: subprocess.Popen[bytes] | None = None

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
            lost = self._watch.lost(2 * BEAT)
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
            if self._keeper is not None:
                self._keeper.communicate(b"done\n")

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
            call, letters, size = HEADER.unpack(_exactly(peer.calls, HEADER.size))
            theirs = _exactly(peer.calls, letters).decode(errors="replace")
            if (call, theirs) != (self._calls, name) or size > MOST_BYTES:
                raise OutOfStep(f"{peer.name} is at its call {call}, {theirs!r}; here it is {self._calls}, {name!r}")
            return _exactly(peer.calls, size)
        except OSError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: Peer, error: OSError) -> HostLost:
        if isinstance(error, TimeoutError):
            return HostLost(f"{peer.name} is not done {ENDING:.0f} s after this one")
        return HostLost(self._watch.lost(2 * BEAT) or f"the connection to {peer.name} is broken: {error}")


ALONE = Hosts()
"""The only process of a run."""
UNTIL_THE_END: list[socket.socket] = []
"""What process 0 sees closed when this process is gone."""
Parts = Sequence[bytes | memoryview]
"""What is sent as one; the lengths are in bytes."""


def packed(groups: Sequence[Sequence[np.ndarray]]) -> Parts:
    """Arrays as bytes: what they are, in JSON, and their numbers. Raises TypeError for arrays of Python's objects."""
    kinds: list[list[Any]] = []
    parts: list[bytes | memoryview] = []
    for group in groups:
        for array in group:
            if array.dtype.hasobject:
                raise TypeError("only numbers and fixed texts can be sent")
            numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            parts += [numbers, bytes(-len(numbers) % ALIGNMENT)]
        # What extends NumPy, such as bfloat16, is known by its name alone.
        kinds.append([[a.dtype.name if a.dtype.kind == "V" else a.dtype.str, a.shape] for a in group])
    header = json.dumps(kinds).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    return [struct.pack("!Q", len(header)), header, *parts]


def unpacked(said: bytearray) -> list[list[np.ndarray]]:
    """The arrays that `packed` made these bytes of, in their memory."""
    (length,) = struct.unpack_from("!Q", said)
    start = 8 + length
    groups: list[list[np.ndarray]] = []
    for kinds in json.loads(said[8:start]):
        groups.append([])
        for name, shape in kinds:
            array = np.ndarray(shape, np.dtype(name), said, start)
            groups[-1].append(array)
            start += array.nbytes + -array.nbytes % ALIGNMENT
    return groups


class Meeting(NamedTuple):
    """Where process 0 listens, and what whoever belongs to the run knows."""

    addresses: list[str]
    port: int
    token: str


def listen() -> socket.socket:
    """A socket at a port that the system chooses, on all of the host's addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def meet(process: int, count: int, meeting: Meeting, listener: socket.socket | None, seconds: float) -> Hosts:
    """Connects process 0, which has the listener, and the others. Raises UserError after so many seconds."""
    until = time.monotonic() + seconds
    if listener is None:
        calls, name = _reach(process, count, "calls", meeting, until)
        line, _ = _reach(process, count, "line", meeting, until)
        return Hosts(process, count, {0: Peer(name, calls, line)})
    found: dict[tuple[int, str], tuple[socket.socket, str]] = {}
    while len(found) < 2 * (count - 1):
        listener.settimeout(max(0.01, until - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            missing = [str(other) for other in range(1, count) if not {(other, "calls"), (other, "line")} <= set(found)]
            raise UserError(f"process {', '.join(missing)} did not connect within {seconds:.0f} s") from error
        try:
            connection.settimeout(2 * BEAT)
            ours, theirs = _keys(connection, meeting, is_first=True)
            introduced = json.loads(_proven(connection, theirs))
            _prove(connection, ours, identity())
        except (OSError, ValueError):  # whoever it was does not belong to the run
            connection.close()
            continue
        key = (introduced["process"], introduced["connection"])
        if key in found:  # it did not hear our answer, and tried again
            found[key][0].close()
        found[key] = (connection, name_of(introduced["process"], count, introduced["identity"]))
    peers = {}
    for other in range(1, count):
        (calls, name), (line, _) = found[other, "calls"], found[other, "line"]
        peers[other] = Peer(name, _ready(calls, None), _ready(line, BEAT))
    return Hosts(process, count, peers)


def _reach(process: int, count: int, what: str, meeting: Meeting, until: float) -> tuple[socket.socket, str]:
    """A connection to process 0, and its name."""
    reason = ""
    while time.monotonic() < until:
        for address in meeting.addresses:
            try:
                connection = socket.create_connection((address, meeting.port), timeout=10 * BEAT)
            except OSError as error:
                reason = f"{address}: {error.strerror or error}"
                continue
            try:
                ours, theirs = _keys(connection, meeting, is_first=False)
                own = {"process": process, "connection": what, "identity": identity()}
                _prove(connection, ours, json.dumps(own))
                name = name_of(0, count, _proven(connection, theirs))
                return _ready(connection, None if what == "calls" else BEAT), name
            except OSError as error:
                reason = f"{address}: {error}"
                connection.close()
        time.sleep(BEAT / 4)
    raise UserError(f"process 0 is not reached at port {meeting.port}: {reason}")


def _ready(connection: socket.socket, seconds: float | None) -> socket.socket:
    connection.settimeout(seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _keys(connection: socket.socket, meeting: Meeting, is_first: bool) -> tuple[bytes, bytes]:
    """What each side proves what it says with, new for each connection: ours, theirs."""
    own = secrets.token_bytes(16)
    connection.sendall(own)
    other = bytes(_exactly(connection, 16))
    both = own + other if is_first else other + own
    keys = [hmac.digest(meeting.token.encode(), side + both, "sha256") for side in (b"first", b"other")]
    return (keys[0], keys[1]) if is_first else (keys[1], keys[0])


def _prove(connection: socket.socket, key: bytes, text: str) -> None:
    said = text.encode()
    connection.sendall(PROVEN.pack(hmac.digest(key, said, "sha256"), len(said)) + said)


def _proven(connection: socket.socket, key: bytes) -> str:
    proof, length = PROVEN.unpack(_exactly(connection, PROVEN.size))
    said = bytes(_exactly(connection, min(length, MOST_TEXT)))
    if not hmac.compare_digest(proof, hmac.digest(key, said, "sha256")):
        raise ConnectionError("a stranger")
    return said.decode()


def _received(connection: socket.socket) -> bytes:
    """What has come; nothing where nothing will come any more."""
    try:
        return connection.recv(1 << 16)
    except OSError:  # a process that dies may reset it
        return b""


def _exactly(connection: socket.socket, count: int) -> bytearray:
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


class Wanted(NamedTuple):
    """The run to join; what is None, JAX is to find out from the cluster."""

    coordinator: str | None
    processes: int | None
    process_id: int | None


def asked(
    distributed: bool,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Wanted | None:
    """What the command line and the environment ask for; None for a run of one process.

    Raises UserError for what cannot be, before JAX is imported.
    """
    if not distributed:
        if (coordinator, processes, process_id) != (None, None, None):
            raise UserError("--coordinator, --processes and --process-id have no meaning without --distributed")
        return None
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(environment, "JAX_NUM_PROCESSES") if processes is None else processes
    process_id = _number(environment, "JAX_PROCESS_ID") if process_id is None else process_id
    if coordinator is not None:
        _host_and_port(coordinator)
    if processes is not None and not 1 <= processes <= 1 << 16:
        raise UserError(f"--processes {processes} must be between 1 and {1 << 16}")
    if process_id is not None and not 0 <= process_id < (processes or 1 << 16):
        raise UserError(f"--process-id {process_id} must be between 0 and {(processes or 1 << 16) - 1}")
    return Wanted(coordinator, processes, process_id)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text} is no number")
    return int(text) if text else None


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != (host != bare) or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UserError(f"--coordinator {coordinator} must be HOST:PORT, such as 10.0.0.1:1234, a port from 1 to 65535")
    return bare, int(port)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    seconds: float = START,
) -> Hosts:
    """Makes this process one of a run on several hosts; `asked` says what is given. To be called before JAX begins.

    Raises UserError where the processes do not find each other within so many seconds. What JAX waits for cannot be
    interrupted, and in the end it aborts: then the process ends here, with one line and status 2.
    """
    import jax

    wanted = Wanted(coordinator, processes, process_id)
    late = f"the processes did not find each other within {seconds:.0f} s: is each started with the same --coordinator "
    late += "and --processes, and a --process-id of its own?"
    until = time.monotonic() + seconds
    alarm = threading.Timer(seconds, leave, (late,))
    alarm.daemon = True
    alarm.start()
    try:
        if coordinator is not None:
            _check(coordinator, process_id, seconds - BEAT)
        descriptors, on_sigterm = set(_sockets()), signal.getsignal(signal.SIGTERM)
        try:
            jax.distributed.initialize(*wanted, initialization_timeout=int(seconds) + 60, heartbeat_timeout_seconds=100)
            if on_sigterm is not None:  # JAX has taken it, for a notice that the machine will be gone
                signal.signal(signal.SIGTERM, on_sigterm)
            to_coordinator = set(_sockets()) - descriptors
            process, count = jax.process_index(), jax.process_count()
            if count == 1:
                return ALONE
            with listen() if process == 0 else contextlib.nullcontext() as listener:
                own = b""
                if listener is not None:
                    meeting = Meeting(_addresses(coordinator), listener.getsockname()[1], secrets.token_hex(16))
                    own = json.dumps(meeting).encode()
                meeting = Meeting(*json.loads(_from_first_device(own)))
                hosts = meet(process, count, meeting, listener, until - time.monotonic() - BEAT)
        except UserError:
            raise
        except Exception as error:  # JAX has no class of its own for any of its reasons
            raise _not_joined(error, wanted) from error
        if process == 0:
            hosts._keeper = _keep_open(to_coordinator & set(_sockets()))
        try:
            hosts.same("--processes", str(processes or count))
        except UserError as error:
            hosts.close(str(error))
            raise
        return hosts
    finally:
        alarm.cancel()


def _not_joined(error: Exception, wanted: Wanted) -> UserError:
    missing = [f"--{name.replace('_', '-')}" for name, value in wanted._asdict().items() if value is None]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if missing and not isinstance(error, RuntimeError):
        return UserError(f"JAX finds no cluster here that tells {', '.join(missing)}: they are to be given ({reason})")
    return UserError(f"JAX does not join the processes: {reason}")


def _check(coordinator: str, process_id: int | None, seconds: float) -> None:
    """Raises UserError for what JAX would abort for: a port in use, nobody at the address."""
    host, port = _host_and_port(coordinator)
    if process_id == 0:
        # JAX shares a port with another run's, and what comes in goes to either.
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
                socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
        except OSError as error:
            known = {errno.EADDRINUSE: "is in use", errno.EACCES: "is not for users"}
            raise UserError(f"--coordinator: port {port} {known.get(error.errno or 0, error.strerror)}") from error
    elif process_id is not None:
        until, reason = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            try:
                return socket.create_connection((host, port), timeout=2 * BEAT).close()
            except OSError as error:
                reason = error.strerror or str(error)
                time.sleep(BEAT / 4)
        raise UserError(f"process 0 is not reached at --coordinator {coordinator} within {seconds:.0f} s: {reason}")
    return None


def _addresses(coordinator: str | None) -> list[str]:
    """Where others may reach this host, the likeliest first."""
    found = [_host_and_port(coordinator)[0]] if coordinator else []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):  # it has no route
        probe.connect(("192.0.2.1", 9))  # sends nothing: the system says which address it would send from
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, socket.getfqdn(), socket.gethostname()]))


def _from_first_device(own: bytes) -> bytes:
    """What process 0 gives, over one device of each process; they may have different numbers of devices."""
    import jax

    sharding: Any = jax.sharding  # not annotated
    by_process = {device.process_index: device for device in reversed(jax.devices())}
    devices = np.array([device for _, device in sorted(by_process.items())])
    mesh = sharding.Mesh(devices, ("host",), axis_types=(sharding.AxisType.Auto,))
    row = np.frombuffer(own.ljust(ROW), np.uint8)[None]
    rows = jax.make_array_from_single_device_arrays(
        (len(by_process), ROW),
        sharding.NamedSharding(mesh, sharding.PartitionSpec("host")),
        [jax.device_put(row, by_process[jax.process_index()])],
    )
    told: Any = jax.jit(lambda rows: rows, out_shardings=sharding.NamedSharding(mesh, sharding.PartitionSpec()))(rows)
    return bytes(np.asarray(told.addressable_data(0))[0]).strip()


def _sockets() -> Iterator[int]:
    """The descriptors of this process that are sockets, where the system tells."""
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # that of the listing itself is gone
            if str(path.readlink()).startswith("socket:"):
                yield int(path.name)


def _keep_open(descriptors: set[int]) -> subprocess.Popen[bytes]:
    """Keeps connections of this process open for a while when it dies.

    As soon as process 0's connections close, JAX aborts the other processes, in the middle of what they say or write.
    """
    connected = []
    for number in descriptors:
        with socket.socket(fileno=os.dup(number)) as connection:
            if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # the next run needs the port
                connected.append(number)
    return subprocess.Popen(
        ["sh", "-c", f"read done || sleep {GRACE + 2 * LEAVING:.0f}", f"connections-of-{os.getpid()}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=connected,
        start_new_session=True,
    )
