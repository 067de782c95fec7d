"""How a run is asked to stop: the first SIGINT or SIGTERM is a wish, the second one is obeyed at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether somebody wants the run to end, and which signal said so."""

    def __init__(self) -> None:
        self.signal = 0

    def is_made(self) -> bool:
        """Whether a signal has come."""
        return self.signal != 0


@contextlib.contextmanager
def by_signal() -> Iterator[Wish]:
    """Inside, SIGINT and SIGTERM make a wish; a second one ends the process with 128 and its number.

    Python's own handlers wait until the device has finished what it does. A thread that reads what the system's
    handler writes is awake at once.
    """
    wish = Wish()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] not in SIGNALS:
                continue
            if wish.is_made():
                os._exit(128 + number[0])
            wish.signal = number[0]
            said = "stopping at the end of this epoch, and saving it; once more stops at once\n"
            with contextlib.suppress(OSError):  # nobody there to read it
                os.write(sys.stderr.fileno(), said.encode())

    thread = threading.Thread(target=listen, daemon=True)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield wish
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)
