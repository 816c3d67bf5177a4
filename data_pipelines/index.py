"""The index of a prepared data set: what is known of its frames without reading them.

    index/person.npy, camera.npy, ...    a file a column, mapped into memory and not loaded
    index.json                           their sizes and checksums; written last

All processes of a host that read a data set share the pages of one copy, whatever their number.
Folders that were written before have all columns in one `index.npz`, which is loaded instead.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zlib

import numpy as np
from etils import epath

from data_pipelines.cache import local_copy
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import is_remote, list_folder, write
from data_pipelines.numpy_files import from_npz

_FILE, _FOLDER, _OLD_FILE = "index.json", "index", "index.npz"


@dataclasses.dataclass(frozen=True)
class Index:
    """What is known of a data set's N frames in C clips without reading them.

    Attributes:
      clip_start: [C+1] int64, first record of each clip; its frames follow one another.
      person, sequence: [C] names of each clip.
      source: [C] int8, `MONOCULAR` or `MULTI_VIEW`.
      camera_names: [K] names of all cameras.
      camera: [N] int32, row of `camera_names`.
      timestep: [N] int32.
      jaw: [N] float32, angle in radians by which the jaw is turned from its rest.
      shard_start: [S+1] int64, first record of each shard.
      shard_bytes: [S] int64, size of each shard's file.
      record_end: [N] int64, where each record ends in its shard (`ranges.record_ends`); 0 where
        that is not known, in folders that were written before.
      image_size: [] int64, pixels a side of the smallest image.
    """

    clip_start: np.ndarray
    person: np.ndarray
    sequence: np.ndarray
    source: np.ndarray
    camera_names: np.ndarray
    camera: np.ndarray
    timestep: np.ndarray
    jaw: np.ndarray
    shard_start: np.ndarray
    shard_bytes: np.ndarray
    record_end: np.ndarray
    image_size: np.ndarray

    @property
    def num_frames(self) -> int:
        return int(self.clip_start[-1])

    def clip_of(self, record: int) -> int:
        """The clip to which a record belongs."""
        return int(np.searchsorted(self.clip_start, record, side="right")) - 1

    def shard_of(self, record: int) -> int:
        """The shard in which a record lies."""
        return int(np.searchsorted(self.shard_start, record, side="right")) - 1


def is_finished(folder: epath.Path) -> bool:
    """Whether a folder holds a data set that was prepared to the end."""
    return (folder / _FILE).exists() or (folder / _OLD_FILE).exists()


def find_sets(folder: epath.PathLike) -> list[epath.Path]:
    """The prepared data set `folder`, or those in it by name.

    Raises:
      MissingFileError: there is none.
    """
    folder = epath.Path(folder)
    if is_finished(folder):
        return [folder]
    found = [path for path in list_folder(folder) if path.is_dir() and is_finished(path)]
    if not found:
        raise MissingFileError(
            f"{folder} holds no finished data set; prepare one with "
            "`python -m data_pipelines.prepare`"
        )
    return found


def remove_index(folder: epath.Path) -> None:
    """Makes a folder an unfinished one, to which shards may be added."""
    for name in (_FILE, _OLD_FILE):
        (folder / name).unlink(missing_ok=True)


def write_index(folder: epath.Path, index: Index) -> None:
    """Writes the index of a folder and with it finishes it; raises `UserError`."""
    columns = {}
    for name, values in dataclasses.asdict(index).items():
        file = io.BytesIO()
        np.save(file, np.asarray(values), allow_pickle=False)
        content = file.getvalue()
        columns[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        write(folder / _FOLDER / f"{name}.npy", content)
    write(folder / _FILE, json.dumps({"columns": columns}, indent=2))


def index_version(folder: epath.Path) -> bytes:
    """What differs between indexes of different content."""
    path = folder / _FILE
    return (path if path.exists() else folder / _OLD_FILE).read_bytes()


def read_index(folder: epath.Path, version: str, *, check: bool = True) -> Index:
    """The index of a finished folder, its columns mapped.

    Args:
      folder: local, or in the cloud, of which the columns are copied once a host (see `cache`).
      version: of its content, for the copy.
      check: whether to read it all and compare the checksums.

    Raises:
      ValueError, OSError, KeyError, TypeError: it is damaged.
    """
    if not (folder / _FILE).exists():
        columns = from_npz((folder / _OLD_FILE).read_bytes(), folder / _OLD_FILE)
        columns.setdefault("record_end", np.zeros(len(columns["camera"]), np.int64))
        return Index(**columns)
    columns = json.loads((folder / _FILE).read_text())["columns"]
    arrays = {}
    for field in dataclasses.fields(Index):
        path, expected = folder / _FOLDER / f"{field.name}.npy", columns[field.name]
        local = local_copy(path, version) if is_remote(path) else os.fspath(path)
        if os.path.getsize(local) != expected["bytes"] or (
            check and _checksum(local) != expected["crc32"]
        ):
            raise UserError(f"{path} is not what was written")
        # As a plain view: memmap's own indexing is slow.
        arrays[field.name] = np.load(local, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return Index(**arrays)


def _checksum(path: str) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
