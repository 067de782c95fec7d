"""How the processes of a run on several hosts find each other: what is asked for, JAX's own meeting, and ours after it.

JAX brings the processes together and tells how many there are. Over one device of each, process 0 tells the others
where it listens, and a token; who connects there proves that it knows it.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnlib.errors import UserError
from cnnlib.hosts import ALONE, BEAT, GRACE, LEAVING, MOST_TEXT, Hosts, Peer, exactly, identity, leave, name_of

START = 300.0
"""Seconds the processes have to find each other."""
ROW = 1024
"""Bytes that process 0 tells the others over JAX: where it listens."""
PROVEN = struct.Struct("!32sH")
"""Of a text between strangers: the proof that the token is known, the length of the text."""


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
    other = bytes(exactly(connection, 16))
    both = own + other if is_first else other + own
    keys = [hmac.digest(meeting.token.encode(), side + both, "sha256") for side in (b"first", b"other")]
    return (keys[0], keys[1]) if is_first else (keys[1], keys[0])


def _prove(connection: socket.socket, key: bytes, text: str) -> None:
    said = text.encode()
    connection.sendall(PROVEN.pack(hmac.digest(key, said, "sha256"), len(said)) + said)


def _proven(connection: socket.socket, key: bytes) -> str:
    proof, length = PROVEN.unpack(exactly(connection, PROVEN.size))
    said = bytes(exactly(connection, min(length, MOST_TEXT)))
    if not hmac.compare_digest(proof, hmac.digest(key, said, "sha256")):
        raise ConnectionError("a stranger")
    return said.decode()


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
        before, on_sigterm = set(_sockets().values()), signal.getsignal(signal.SIGTERM)
        try:
            jax.distributed.initialize(*wanted, initialization_timeout=int(seconds) + 60, heartbeat_timeout_seconds=100)
            if on_sigterm is not None:  # JAX has taken it, for a notice that the machine will be gone
                signal.signal(signal.SIGTERM, on_sigterm)
            to_coordinator = set(_sockets().values()) - before
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
            hosts.keeper = _keep_open(to_coordinator)
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


def _sockets() -> dict[int, str]:
    """What the system calls the sockets of this process, by their descriptors, whose numbers are used again."""
    found = {}
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed by now
            if (name := str(path.readlink())).startswith("socket:"):
                found[int(path.name)] = name
    return found


def _keep_open(sockets: set[str]) -> subprocess.Popen[bytes]:
    """Keeps connections of this process open for a while when it dies.

    As soon as process 0's connections close, JAX aborts the other processes, in the middle of what they say or write.
    """
    connected = []
    for number, name in _sockets().items():
        if name in sockets:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:  # closed by now
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
