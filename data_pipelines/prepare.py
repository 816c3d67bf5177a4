"""Prepares a data set for training: `python -m data_pipelines.prepare NAME --out DIR [options]`.

NAME is `procedural`, a data set of `DATA_SETS`, or `folder`; `--help` after NAME lists its options.
A killed run is continued by the same command.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from data_pipelines.captures import CaptureSet
from data_pipelines.record import QUALITY
from data_pipelines.shard_writer import write_shards

DATA_SETS = {
    "procedural": "data_pipelines.procedural.data_sets",
    "nersemble": "data_pipelines.datasets.nersemble",
    "ava256": "data_pipelines.datasets.ava256",
    "cafca": "data_pipelines.datasets.cafca",
    "celebv_hq": "data_pipelines.datasets.celebv_hq",
    "celebv_text": "data_pipelines.datasets.celebv_text",
    "hello3": "data_pipelines.datasets.hello3",
    "vfhq_test": "data_pipelines.datasets.vfhq_test",
    "folder": "data_pipelines.datasets.folder",
}
"""Module of each data set, imported only when it is asked for.

It has `add_arguments(parser)`, which adds its own options, and `capture_sets(args)`, which returns
a list of `CaptureSet`s. All its options but `--source` are settings on which the frames depend.
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare", description="Prepares a data set for training."
    )
    names = parser.add_subparsers(dest="data_set", required=True, metavar="NAME")
    for name, module in DATA_SETS.items():
        options = names.add_parser(name)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(options)
        options.add_argument("--out", required=True, help="folder of prepared data sets")
        options.add_argument("--quality", type=int, default=QUALITY, help="JPEG quality of frames")
        options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    try:
        for captures in importlib.import_module(DATA_SETS[args.data_set]).capture_sets(args):
            _prepare(captures, args)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _prepare(captures: CaptureSet, args: argparse.Namespace) -> None:
    own = {"out", "quality", "workers", "source"}  # what does not decide the frames, or is noted
    settings = {key: value for key, value in vars(args).items() if key not in own}
    summary = write_shards(captures, args.out, settings, args.workers, args.quality)
    print(f"{os.path.join(args.out, captures.name)}: {summary}")


if __name__ == "__main__":
    sys.exit(main())
