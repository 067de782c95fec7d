"""Run one experiment in several processes, one per host, with `jax.distributed`.

JAX finds, connects and monitors the processes. If one process dies, JAX ends the other processes. The processes
exchange messages through `multihost_utils`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from cnnlib.errors import Stopped, UserError

START = 300.0
"""Seconds within which the processes must find each other."""
HEARTBEAT = 20
"""Seconds without a heartbeat after which JAX considers a process dead and ends the other processes."""
LEAVING = 10.0
"""Seconds that a process with an error waits before it ends, so that other processes can print the same error."""
SMALLEST = 1024
"""Minimum message size in bytes. Sizes are rounded up to powers of two, because JAX compiles one program per size."""


@dataclass(frozen=True)
class Hosts:
    """The processes of a run. There are `count` processes; this process has the number `process`, from 0 on.

    All processes must call the same methods in the same order. On exit, `with hosts:` ends the run. If there is no
    error, the exit waits for the other processes. If another process has died, the exit raises UserError.
    """

    process: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is process 0. Only process 0 writes the run's files and prints."""
        return self.process == 0

    def gathered(self, value: bytes) -> list[bytes]:
        """Return the `value` of every process, in the order of the processes."""
        if self.count == 1:
            return [value]
        from jax.experimental.multihost_utils import process_allgather

        sizes = process_allgather(np.array(len(value), np.int32))
        room = max(SMALLEST, 1 << int(sizes.max() - 1).bit_length()) if sizes.max() else SMALLEST
        rows = process_allgather(np.frombuffer(value.ljust(room, b"\0"), np.uint8))
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def from_first(self, value: bytes | None) -> bytes:
        """Return the `value` of process 0; the values of the other processes are ignored."""
        if self.is_first and value is None:
            raise ValueError("process 0 gives nothing")
        return self.gathered((value or b"") if self.is_first else b"")[0]

    def agreed(self, wish: bool) -> bool:
        """Return True on all processes if `wish` is True on at least one of them."""
        return b"yes" in self.gathered(b"yes" if wish else b"no")

    def lowest(self, number: int) -> int:
        """Return the lowest `number` of all processes."""
        return min(map(int, self.gathered(b"%d" % number)))

    def same(self, what: str, value: str) -> None:
        """Raise UserError on all processes if the `value` of any process differs from process 0. `what` names it."""
        first, *others = (text.decode() for text in self.gathered(value.encode()))
        found = [
            f"process {process} of {self.count}: {what} {other}, process 0 has {first}"
            for process, other in enumerate(others, 1)
            if other != first
        ]
        if found:
            raise UserError("; ".join(found))

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.count == 1:
            return
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"another process of the run has ended, and its own output says why ({reason}); --resume on all hosts "
                "goes on with what is saved"
            ) from error
        # JAX ends the other processes as soon as process 0 is gone, so wait for them. `shutdown` waits even for dead
        # processes, so limit the wait after an error.
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(None if error is None or isinstance(error, Stopped) else LEAVING)


ALONE = Hosts()
"""The hosts of a run of a single process."""


class Cluster(NamedTuple):
    """The run to join. If a field is None, JAX takes its value from the environment of the cluster."""

    coordinator: str | None
    processes: int | None
    process_id: int | None
    heartbeat: int = HEARTBEAT


def asked(
    distributed: bool,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Return the cluster that the command line and the environment ask for; None for a run of one process.

    Raise UserError for invalid values, before JAX is imported.
    """
    if not distributed:
        if (coordinator, processes, process_id, heartbeat) != (None,) * 4:
            raise UserError("--coordinator, --processes, --process-id and --heartbeat need --distributed")
        return None
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(environment, "JAX_NUM_PROCESSES") if processes is None else processes
    process_id = _number(environment, "JAX_PROCESS_ID") if process_id is None else process_id
    if coordinator is not None:
        _check_address(coordinator)
    if processes is not None and not 1 <= processes <= 1 << 16:
        raise UserError(f"--processes {processes} must be between 1 and {1 << 16}")
    if process_id is not None and not 0 <= process_id < (processes or 1 << 16):
        raise UserError(f"--process-id {process_id} must be between 0 and {(processes or 1 << 16) - 1}")
    if heartbeat is not None and not 5 <= heartbeat <= 3600:
        raise UserError(f"--heartbeat {heartbeat} must be between 5 and 3600 seconds")
    return Cluster(coordinator, processes, process_id, heartbeat or HEARTBEAT)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text} is no number")
    return int(text) if text else None


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != (host != bare) or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UserError(f"--coordinator {coordinator} must be HOST:PORT, such as 10.0.0.1:1234, a port from 1 to 65535")


def join(cluster: Cluster, seconds: float = START) -> Hosts:
    """Join this process to a run on several hosts. Call this function before JAX computes anything.

    Raise UserError if JAX finds no cluster, or if the hosts have different numbers of devices. If the processes do not
    find each other within `seconds`, print one line and end the process with status 2. JAX would abort the process.
    """
    import jax

    late = f"the processes did not find each other within {seconds:.0f} s: is each started with the same --coordinator "
    late += "and --processes, and a --process-id of its own?"
    alarm = threading.Timer(seconds, _leave, (late,))
    alarm.daemon = True
    alarm.start()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process_id,
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=cluster.heartbeat,
        )
        devices = [device.process_index for device in jax.devices()]
    except Exception as error:  # JAX has no exception class of its own for these errors
        raise _not_joined(error, cluster) from error
    finally:
        alarm.cancel()
        if on_sigterm is not None:  # JAX has replaced the handler of SIGTERM: restore ours
            signal.signal(signal.SIGTERM, on_sigterm)
    hosts = Hosts(jax.process_index(), jax.process_count())
    counts = [devices.count(process) for process in range(hosts.count)]
    if len(set(counts)) > 1:
        with hosts:
            raise UserError(
                f"the hosts have {', '.join(map(str, counts))} devices; all need equally many: devices={min(counts)}"
            )
    return hosts


def _not_joined(error: Exception, cluster: Cluster) -> UserError:
    missing = [f"--{name.replace('_', '-')}" for name, value in cluster._asdict().items() if value is None]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if missing and not isinstance(error, RuntimeError):
        return UserError(f"JAX finds no cluster here that tells {', '.join(missing)}: they are to be given ({reason})")
    return UserError(f"JAX does not join the processes: {reason}")


def _leave(text: str) -> None:
    """Print one line and end the process at once, without waiting for its threads."""
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(sys.stderr.fileno(), f"error: {text}\n".encode())
    os._exit(2)
