"""The one exception for what a user has to mend: wrong options, configs, files and data."""

from __future__ import annotations

import sys

GIVE_UP = 2
"""Exit status of what the same command would meet again: schedulers need not try."""

TRY_AGAIN = 1
"""Exit status of what may be over by the next time: a full disk, a network, a lost process."""


class UserError(ValueError):
    """One sentence that names the file, record or field, what was expected and what to do.

    Raised on purpose, where user input comes in: options, configs, files, data. Commands print the
    sentence alone; any other exception is a defect of the program and keeps its stack trace.

    Attributes:
      status: the exit status of a command that ends so, `GIVE_UP` or `TRY_AGAIN`.
    """

    def __init__(self, message: str, *, status: int = GIVE_UP):
        super().__init__(message)
        self.status = status


class MissingFileError(UserError):
    """A file or folder that should be there is not: it may be there the next time."""

    def __init__(self, message: str, *, status: int = TRY_AGAIN):
        super().__init__(message, status=status)


def report_error(error: UserError | OSError) -> int:
    """Prints what ended a command as one line on stderr; returns the exit status.

    What the operating system refuses (a disk that is gone, a folder that may not be read) is no
    defect of the program either, and may be over by the next time.
    """
    print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
    return error.status if isinstance(error, UserError) else TRY_AGAIN


def one_line(text: str) -> str:
    """The text in one line that a terminal shows and does not obey.

    Names in strangers' files may hold anything: what is not printable comes as in Python, \\x1b.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
