"""How every command of the package starts, and how it tells its user what is wrong.

A user's mistake ends a command with one sentence on stderr and a non-zero exit status; the stack
trace is there for whoever sets FLEXAVATAR_TRACEBACK=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

USER_ERRORS = (ValueError, OSError)
"""What the package raises with a sentence for its user: wrong values, missing or broken files."""


def fail(error: Exception, status: int = 1) -> NoReturn:
    """Prints `error` as one line on stderr and exits with `status`."""
    if os.environ.get("FLEXAVATAR_TRACEBACK"):
        raise error
    say_error(str(error))
    sys.exit(status)


def say_error(message: str) -> None:
    """Prints `message` as one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags and config overrides; a wrong one is named in one sentence (exit 2)."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error, status=2)
    except FileNotFoundError:
        path = next((a.removeprefix("--config=") for a in argv if a.startswith("--config=")), None)
        path = path or (argv[argv.index("--config") + 1] if "--config" in argv else "--config")
        fail(FileNotFoundError(f"no config file {path}; configs/ has the ones that ship"), status=2)
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        # ml_collections reports an unknown or mistyped field this way, with a suggestion.
        message = str(error.args[0] if error.args else error).replace("\\n", " ").strip("'\"")
        fail(ValueError(f"in --config and its overrides: {message}"), status=2)


def guard(main: Callable[[], int | None]) -> int | None:
    """Runs `main`; a user's mistake ends the process with one sentence."""
    try:
        return main()
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        return 130


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, runs `main`, and turns a user's mistake into one sentence."""

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            fail(ValueError(f"argument {argv[1]!r} is not known; --help lists the flags"), 2)
        return guard(main)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse_flags)
