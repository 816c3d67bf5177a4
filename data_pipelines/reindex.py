"""Brings prepared data sets up to date: `python -m data_pipelines.reindex DIR`.

DIR is a prepared data set or a folder of several, local or in the cloud. Their index becomes one
file a column, which processes share, and says where each record lies, by which it is read from a
bucket; their shards get names that stay as the folder grows. No frame is written again. Shards in
the cloud whose records' places are not known are fetched whole, so run it near the bucket, once.
"""

from __future__ import annotations

import argparse
import os
import sys

from etils import epath

from data_pipelines.errors import UserError, report_error
from data_pipelines.finishing import finish
from data_pipelines.index import find_sets, is_up_to_date, remove_old_index
from data_pipelines.shard_parts import complete_parts
from data_pipelines.shard_plan import rename_old_shards
from data_pipelines.shards import PreparedSet


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.reindex", description="Brings prepared data up to date."
    )
    parser.add_argument("dir", metavar="DIR", help="a prepared data set, or a folder of several")
    try:
        for folder in find_sets(parser.parse_args(argv).dir):
            done = reindex(folder)
            print(f"{os.fspath(folder)}: {'brought up to date' if done else 'is up to date'}")
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


def reindex(folder: epath.PathLike) -> bool:
    """Brings a finished data set up to date; returns whether there was something to do.

    Killed, it goes on when called again.

    Raises:
      UserError: the folder is damaged, or cannot be written to.
    """
    prepared = PreparedSet(folder)
    if is_up_to_date(prepared.folder) and prepared.index.record_end.all():
        return False
    complete_parts(prepared)
    rename_old_shards(prepared.folder, prepared.name)
    finish(prepared.folder, len(prepared.index.shard_bytes))
    remove_old_index(prepared.folder)
    return True


if __name__ == "__main__":
    sys.exit(main())
