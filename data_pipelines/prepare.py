"""Prepares a data set for training: `python -m data_pipelines.prepare NAME --out DIR [options]`.

NAME is one of `DATA_SETS`; `--help` after it lists its options. A killed run is continued by the
same command, and ends with a summary of what was prepared, what was left out, and why. What was
left out is tried again with `--retry`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from etils import epath

from data_pipelines.errors import UserError, report_error
from data_pipelines.index import is_finished
from data_pipelines.record import QUALITY
from data_pipelines.shard_writer import Part, write_shards

DATA_SETS = (
    "procedural",
    "folder",
    "nersemble",
    "ava256",
    "cafca",
    "celebv_hq",
    "celebv_text",
    "hello3",
    "vfhq_test",
)
"""Modules of `data_pipelines.datasets`, each imported only when it is asked for.

A module has `add_arguments(parser)`, which adds its own options, and `capture_sets(args)`, which
returns a list of `CaptureSet`s. All its options are noted in the prepared folder as settings on
which the frames depend.
"""

_NO_SETTINGS = ("out", "workers", "quality", "retry", "part")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare", description="Prepares a data set for training."
    )
    names = parser.add_subparsers(dest="data_set", required=True, metavar="NAME")
    for name in DATA_SETS:
        options = names.add_parser(name)
        if argv[:1] == [name]:
            module = importlib.import_module(f"data_pipelines.datasets.{name}")
            module.add_arguments(options)
        options.add_argument("--out", required=True, help="folder of prepared data sets")
        options.add_argument(
            "--quality", type=int, default=QUALITY, help="JPEG quality (default: %(default)s)"
        )
        options.add_argument(
            "--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)"
        )
        options.add_argument(
            "--retry", action="store_true", help="read again the shards that left something out"
        )
        options.add_argument(
            "--part",
            default="1/1",
            metavar="K/N",
            help="write the K-th of N parts, for many machines with one --out; finish without it",
        )
    args = parser.parse_args(argv)
    settings = {key: value for key, value in vars(args).items() if key not in _NO_SETTINGS}
    for key, value in getattr(module, "LATER_OPTIONS", {}).items():
        if settings[key] == value:
            del settings[key]
    if "source" in settings:  # the same folder, from wherever the command is given
        settings["source"] = _absolute(args.source)
    try:
        if not 1 <= args.quality <= 100:
            raise UserError(f"--quality is {args.quality}; expected 1 to 100")
        for option in ("workers", "every"):
            value = getattr(args, option, 1)
            if value < 1:
                raise UserError(f"--{option} is {value}; expected 1 or more")
        part = Part.of(args.part)
        for captures in module.capture_sets(args):
            folder = epath.Path(args.out) / captures.name
            before = is_finished(folder)
            summary = write_shards(
                captures, args.out, settings, args.workers, args.quality, args.retry, part
            )
            if summary is None:
                print(
                    f"{os.fspath(folder)}: part {part} is written; when all are, the same command "
                    "without --part finishes the folder"
                )
                continue
            print(f"{os.fspath(folder)}: {summary}")
            if before and not args.retry:
                print(
                    "this was prepared before; what was there is kept, and clips that were new "
                    "were added. To prepare it anew, delete the folder"
                )
            if summary.clips_left_out or summary.frames_left_out:
                print("to try again what was left out, add --retry to the same command")
    except (UserError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


if __name__ == "__main__":
    sys.exit(main())
