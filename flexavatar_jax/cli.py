"""How every command of the package starts, and how it tells its user what is wrong.

A user's mistake (`UserError`) ends a command with one sentence on stderr and its exit status. The
stack trace is there for whoever sets FLEXAVATAR_TRACEBACK=1; any other exception is a defect of the
program and always keeps its own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict

from data_pipelines.errors import TRY_AGAIN, UserError, one_line
from data_pipelines.files import make_writable
from kernels.backends import choose_backend
from kernels.platforms import look_for_no_absent_tpu

T = TypeVar("T")


def fail(error: UserError) -> NoReturn:
    """Prints `error` as one line on stderr and exits with its status."""
    if os.environ.get("FLEXAVATAR_TRACEBACK"):
        raise error
    say_error(str(error))
    sys.exit(error.status)


def say_error(message: str) -> None:
    """Prints `message` as one line on stderr."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags and config overrides; a wrong one is named in one sentence (exit 2)."""
    try:
        check_config_file(argv)
        return flags.FLAGS(argv)
    except UserError as error:
        fail(error)
    except flags.Error as error:
        fail(UserError(str(error)))
    except (AttributeError, KeyError) as error:
        # ml_collections' whole message may be the field's name, with a suggestion or without.
        message = str(error.args[0] if error.args else error).replace("\\n", " ")
        unknown = re.fullmatch(r"\W*(\w+)\W*(Did you mean.*?)?['\"\\]*", message)
        if unknown:
            name, suggestion = unknown.groups("")
            message = f"the config has no field {name}. {suggestion}".strip(" .")
        fail(UserError(f"in --config and its overrides: {message}"))
    except SyntaxError as error:
        message = f"line {error.lineno} of {error.filename} is not Python ({error.msg}); correct it"
        fail(UserError(message))
    except (TypeError, ValueError, OSError) as error:
        fail(UserError(f"in --config and its overrides: {error}"))


def check_config_file(argv: Sequence[str]) -> None:
    """Raises `UserError` if the file of --config is not there: absl would go on without it."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name == "--":
            return
        value = value if equals else following
        if name not in ("--config", "-config") or not value:
            continue
        path = Path(value.split(":", 1)[0])  # the rest is the argument of its get_config
        if not path.is_file():
            raise UserError(f"no config file {path}; configs/ has the ones that ship")
        if path.suffix != ".py":
            raise UserError(f"--config {path} is not a Python config file (.py) as in configs/")


def check_out(out: Path, *, create: bool = False) -> None:
    """Raises `UserError` unless a file can be written at --out: before the work, not after it.

    Its folder must exist, or is made if `create`.
    """
    folder = out.parent
    if not create and not folder.is_dir():
        raise UserError(
            f"--out {out}: there is no folder {folder}; create it first", status=TRY_AGAIN
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file in it")
    try:
        make_writable(folder)
    except UserError as error:
        reason = error.__cause__.strerror
        raise UserError(
            f"--out {out} cannot be written ({reason}); choose another folder", status=TRY_AGAIN
        ) from error


def check_dinov2(dinov2: str, workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """Raises `UserError` for --dinov2 weights that the model of `workdir` has no use for."""
    if dinov2 and not config.model.dino:
        raise UserError(
            f"--dinov2 {dinov2}: the model of {workdir} needs no DINOv2 (model.dino is off in its "
            "config.json); leave the option out"
        )


def check_backend(backend: str) -> None:
    """Raises `UserError` for a rasterizer that `kernels` doesn't know or that can't run here."""
    try:
        choose_backend(backend)
    except ValueError as error:
        raise UserError(str(error)) from error


def guard(main: Callable[[], T]) -> T | int:
    """What `main` returns; a user's mistake ends the process with one sentence."""
    look_for_no_absent_tpu()
    try:
        return main()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        return 130


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, runs `main`, and turns a user's mistake into one sentence."""

    def guarded(argv: Sequence[str]) -> int | None:
        if len(argv) > 1:
            fail(UserError(f"argument {argv[1]!r} is not known; --help lists the flags"))
        return guard(main)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse_flags)
