"""The one exception that the command line turns into a single line and exit status 2."""


class UserError(Exception):
    """A mistake in what the user asked for: one line saying what is wrong, what was expected, what exists."""
