"""Stop a run by signal. The first SIGINT or SIGTERM requests a stop, and the second signal ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """A request to stop the run. `signal` is the number of the signal that made the request, or 0."""

    def __init__(self) -> None:
        self.signal = 0

    def is_made(self) -> bool:
        """Return whether a signal has arrived."""
        return self.signal != 0


@contextlib.contextmanager
def by_signal() -> Iterator[Wish]:
    """Turn the first SIGINT or SIGTERM into a stop request. At the second, exit with status 128 + the signal's number.

    Python calls signal handlers only after the current device computation returns, which can take long. Therefore a
    thread reads the signal number from the pipe of `signal.set_wakeup_fd`, and reacts at once.
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
            with contextlib.suppress(OSError):  # standard error is closed
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
