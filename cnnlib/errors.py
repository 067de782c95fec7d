"""What ends a command: a mistake of the user, which is one line and exit status 2, or the wish to stop."""


class UserError(Exception):
    """A mistake in what the user asked for: one line saying what is wrong, what was expected, what exists."""


class Stopped(Exception):
    """A run that was asked to stop, and did at the end of an epoch; the message says what of it is kept."""
