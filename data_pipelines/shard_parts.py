"""Each shard's part of the index: written beside it, and joined when all shards are there.

Parts are kept, so that a folder can grow without its shards being read again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_pipelines import buckets
from data_pipelines.files import is_remote, list_folder, read, write
from data_pipelines.index import Index
from data_pipelines.numpy_files import from_npz, to_npz
from data_pipelines.ranges import record_ends
from data_pipelines.shards import PreparedSet

CLIP_COLUMNS = {"person": str, "sequence": str, "source": np.int8, "length": np.int64}
FRAME_COLUMNS = {"camera": str, "timestep": np.int32, "jaw": np.float32, "size": np.int64}
LEFT_OUT_COLUMNS = {"clips_left_out": str, "frames_left_out": str}
COLUMNS = {
    **CLIP_COLUMNS,
    **FRAME_COLUMNS,
    **LEFT_OUT_COLUMNS,
    "names_left_out": str,
    "record_end": np.int64,
    "num_bytes": np.int64,
}
"""A part's columns: of clips, of frames, of what was left out, and of the shard itself."""


def part_file(folder: epath.Path, shard: int) -> epath.Path:
    """Where the part of a shard lies."""
    return folder / "parts" / f"{shard:05d}.npz"


def write_part(folder: epath.Path, shard: int, columns: Mapping[str, Any]) -> None:
    """Writes `COLUMNS` of a shard; with that the shard counts as written."""
    arrays = {name: np.array(columns[name], dtype) for name, dtype in COLUMNS.items()}
    write(part_file(folder, shard), to_npz(arrays))


def read_part(folder: epath.Path, shard: int) -> dict[str, np.ndarray]:
    """`COLUMNS` of a shard; raises `UserError` if they are damaged."""
    path = part_file(folder, shard)
    columns = from_npz(read(path), path)
    # Written before clips that are left out were named.
    columns.setdefault("names_left_out", np.full(len(columns["clips_left_out"]), "?"))
    columns.setdefault("record_end", np.zeros(len(columns["camera"]), np.int64))
    return columns


def complete_parts(prepared: PreparedSet) -> None:
    """Writes what the parts of a finished folder lack: once they were not kept.

    A shard in the cloud is fetched whole if it is not known where its records end.
    """
    folder, index = prepared.folder, prepared.index
    there = {path.name for path in list_folder(folder / "parts")}
    for shard in range(len(index.shard_bytes)):
        frames = slice(*index.shard_start[shard : shard + 2])
        kept = part_file(folder, shard).name in there
        if kept and index.record_end[frames].all():
            continue
        columns = read_part(folder, shard) if kept else _part_of(index, shard)
        if not columns["record_end"].all():
            columns["record_end"] = _record_ends(prepared.shard(shard), frames.stop - frames.start)
        write_part(folder, shard, columns)


def _part_of(index: Index, shard: int) -> dict[str, Any]:
    """A shard's part by the index of its folder, nothing having been left out."""
    first, last = index.shard_start[shard : shard + 2]
    frames, clips = slice(first, last), slice(*np.searchsorted(index.clip_start, [first, last]))
    return {
        "person": index.person[clips],
        "sequence": index.sequence[clips],
        "source": index.source[clips],
        "length": np.diff(index.clip_start)[clips],
        "camera": index.camera_names[index.camera[frames]],
        "timestep": index.timestep[frames],
        "jaw": index.jaw[frames],
        "size": np.full(last - first, index.image_size),
        "clips_left_out": [],
        "frames_left_out": [],
        "names_left_out": [],
        "record_end": index.record_end[frames],
        "num_bytes": index.shard_bytes[shard : shard + 1],
    }


def _record_ends(path: epath.Path, count: int) -> np.ndarray:
    if not is_remote(path):
        return record_ends(Path(path), count)
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(buckets.fetch(path))
        copy.flush()
        return record_ends(Path(copy.name), count)
