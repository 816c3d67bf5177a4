"""What lies beside a data set's shards: the settings that it was prepared with, and its summary."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import list_folder, write
from data_pipelines.shard_plan import read_plan

_MOST_NAMES = 10  # of clips left out for one reason, in what is printed


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `write_shards` put into a folder, and what it left out.

    Attributes:
      people, clips, frames: how many there are.
      clips_left_out: names of clips by the reason for which they are not there.
      frames_left_out: number of frames by reason.
    """

    people: int
    clips: int
    frames: int
    clips_left_out: dict[str, list[str]]
    frames_left_out: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.people} people, {self.clips} clips, {self.frames} frames"]
        for reason, names in sorted(self.clips_left_out.items()):
            more = len(names) - _MOST_NAMES
            shown = ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"left out {len(names)} clips ({shown}): {reason}")
        for reason, count in sorted(self.frames_left_out.items()):
            lines.append(f"left out {count} frames: {reason}")
        return "\n".join(lines)


def claim(folder: epath.Path, settings: dict[str, Any], names: list[str]) -> None:
    """Notes the settings in a new folder; raises `UserError` if it has other ones."""
    path = folder / "settings.json"
    if path.exists():
        found = read_json(path)
        # Before there were plans, a folder was of the very clips whose names made this hash.
        clips = found.pop("clips", None)
        if clips is not None and read_plan(folder) is None:
            settings = {**settings, "clips": f"{len(names)} (names hashed: {_hash(names)})"}
            found["clips"] = clips
        for key in {**settings, **found}:
            if found.get(key) != settings.get(key):
                raise UserError(
                    f"{folder} was prepared with {key} {found.get(key)}, not {settings.get(key)}: "
                    "choose another folder or delete this one"
                )
    # Asked again: another machine may have begun just now.
    elif list_folder(folder) and not path.exists():
        raise UserError(
            f"{folder} holds files that are no prepared data set: choose another folder"
        )
    else:
        write(path, json.dumps(settings, indent=2))


def read_summary(folder: epath.Path) -> dict[str, Any]:
    summary = read_json(folder / "summary.json")
    summary["clips_left_out"] = {  # once counts, not names
        reason: names if isinstance(names, list) else ["?"] * names
        for reason, names in summary["clips_left_out"].items()
    }
    return summary


def _hash(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a file that this module wrote; what is wrong with it comes in one sentence."""
    remedy = f"delete {path.parent} and prepare it again"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise MissingFileError(f"{path} is missing: {remedy}") from e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): {remedy}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object): {remedy}")
    return content
