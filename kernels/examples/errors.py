"""What ends an example, said in one line."""

from __future__ import annotations

import sys


def print_error(error: Exception) -> None:
    """Prints an error as one line on stderr that a terminal shows and does not obey.

    Names in strangers' files may hold anything: what is not printable comes as in Python, \\x1b.
    """
    line = " ".join(f"error: {error}".split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(line, file=sys.stderr, flush=True)
