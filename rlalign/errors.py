"""The base of every failure a user can mend: the command line prints it without a traceback."""


class RlalignError(Exception):
    """The message says what happened, the value that was wrong, and what to do."""
