"""Exceptions that end a command: UserError (prints one line, exit status 2) and Stopped (the run was asked to stop)."""


class UserError(Exception):
    """A mistake in the user's request. The message is one line: what is wrong, what was expected, what exists."""


class Stopped(Exception):
    """A run was asked to stop and stopped at the end of an epoch. The message says what is saved."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` if `condition` is false."""
    if not condition:
        raise UserError(message)
