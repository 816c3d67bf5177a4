"""Which clip is written into which shard: decided once, so that a folder can grow.

`clips.json` lists the names of each shard's clips. Clips that a source has won since then go to
shards of their own behind the others, which are not written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from etils import epath

from data_pipelines.errors import UserError
from data_pipelines.files import list_folder, write

MAX_CLIPS_PER_SHARD = 16
CLIPS_FILE = "clips.json"

Plan = list[list[str]]
"""The names of each shard's clips."""


FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
"""TFDS's name for the pattern of `shard_name`."""


def shard_name(name: str, shard: int) -> str:
    """File name of shard number `shard` of the data set `name`, however many there will be."""
    return f"{name}-train.array_record-{shard:05d}"


def old_shard_name(name: str, shard: int, count: int) -> str:
    """The same in folders that were written before data sets could grow."""
    return f"{shard_name(name, shard)}-of-{count:05d}"


def unique_names(names: Iterable[str]) -> list[str]:
    """`names` with a number behind those that came before."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def split(names: list[str]) -> Plan:
    """Clips shared out to shards, at least 16 of them where there are as many clips."""
    step = max(1, min(MAX_CLIPS_PER_SHARD, len(names) // 16))
    return [names[i : i + step] for i in range(0, len(names), step)]


def grown(folder: epath.Path, plan: Plan, names: list[str]) -> Plan:
    """`plan`, with shards for those of `names` that it lacks behind its own.

    Raises:
      UserError: `names` lack a clip of the plan of `folder`.
    """
    known = {name for shard in plan for name in shard}
    if lost := sorted(known.difference(names)):
        raise UserError(
            f"{folder} was prepared with {len(lost)} clips that its source has no more ({lost[0]}, "
            "...): choose another folder or delete this one"
        )
    return plan + split([name for name in names if name not in known])


def read_plan(folder: epath.Path) -> Plan | None:
    """The plan of a folder; None if it has none.

    Raises:
      UserError: it is damaged.
    """
    path = folder / CLIPS_FILE
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text())["shards"]
        if not all(isinstance(name, str) for shard in plan for name in shard):
            raise TypeError("a clip's name is no string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete {folder} and prepare it again"
        ) from None
    return plan


def write_plan(folder: epath.Path, plan: Plan) -> None:
    """Notes a folder's plan; many processes may do so at once, if they agree."""
    write(folder / CLIPS_FILE, json.dumps({"shards": plan}))


def rename_old_shards(folder: epath.Path, name: str) -> None:
    """Gives shards whose files' names end in their number names that stay as the folder grows."""
    for path in list_folder(folder):
        new, of, _ = path.name.rpartition("-of-")
        if not of or not new.startswith(f"{name}-train.array_record-"):
            continue
        try:
            path.rename(folder / new)
        except (FileNotFoundError, FileExistsError):
            if not (folder / new).exists():
                raise  # otherwise another machine's part of this work did it
        except OSError as error:
            raise UserError(f"{os.fspath(path)} cannot be renamed ({error})") from error
