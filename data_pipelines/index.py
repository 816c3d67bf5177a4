"""The index of a prepared data set: what is known of its frames without reading them.

    index/person.npy, camera.npy, ...    a file a column, mapped into memory and not loaded
    index.json                           their sizes and checksums; written last

All processes of a host that read a data set share the pages of one copy, whatever their number.
Of a data set in the cloud the columns are copied once a host, to `$FLEXAVATAR_CACHE`.
Folders that were written before have all columns in one `index.npz`, which is loaded instead.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from etils import epath

from data_pipelines import buckets
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import exists, is_remote, list_folder, read, write, writing
from data_pipelines.numpy_files import from_npz

_FILE, _FOLDER, _OLD_FILE = "index.json", "index", "index.npz"
_PIECE, _PIECES_AT_ONCE = 1 << 25, 8  # of a column that is copied from a bucket, in bytes


@dataclasses.dataclass(frozen=True)
class Index:
    """What is known of a data set's N frames in C clips without reading them.

    Whole numbers of each frame have the smallest type that holds them all: compute with int(x).

    Attributes:
      clip_start: [C+1] int64, first record of each clip; its frames follow one another.
      person, sequence: [C] names of each clip.
      source: [C] int8, `MONOCULAR` or `MULTI_VIEW`.
      camera_names: [K] names of all cameras.
      camera: [N] row of `camera_names`.
      timestep: [N] as the capture counts.
      jaw: [N] float32, angle in radians by which the jaw is turned from its rest.
      shard_start: [S+1] int64, first record of each shard.
      shard_bytes: [S] int64, size of each shard's file.
      record_end: [N] where each record ends in its shard (`ranges.record_ends`); 0 where
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
    image_size: np.ndarray | np.integer

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
    return exists(folder / _FILE) or exists(folder / _OLD_FILE)


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


def is_up_to_date(folder: epath.Path) -> bool:
    """Whether a finished folder's index is one file a column."""
    return exists(folder / _FILE)


def remove_old_index(folder: epath.Path) -> None:
    """Removes the single file that once was the index, when there is another."""
    (folder / _OLD_FILE).unlink(missing_ok=True)


def write_index(folder: epath.Path, index: Index) -> None:
    """Writes the index of a folder and with it finishes it; raises `UserError`."""
    columns = {}
    for name, values in dataclasses.asdict(index).items():
        file = io.BytesIO()
        if name in ("camera", "timestep", "record_end"):
            values = _small(values)
        np.save(file, np.asarray(values), allow_pickle=False)
        content = file.getvalue()
        columns[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        write(folder / _FOLDER / f"{name}.npy", content)
    write(folder / _FILE, json.dumps({"columns": columns}, indent=2))


def _small(values: np.ndarray) -> np.ndarray:
    """The same whole numbers in the smallest type that holds them: eleven bytes a frame, not 20."""
    if not len(values):
        return values
    return values.astype(np.result_type(*map(np.min_scalar_type, (values.min(), values.max()))))


def index_version(folder: epath.Path) -> bytes:
    """What differs between indexes of different content."""
    path = folder / _FILE
    return read(path if exists(path) else folder / _OLD_FILE)


def read_index(folder: epath.Path, version: str, *, check: bool = True) -> Index:
    """The index of a finished folder, its columns mapped.

    Args:
      folder: local, or in the cloud.
      version: of its content, for the host's copy.
      check: whether to read it all and compare the checksums.

    Raises:
      ValueError, OSError, KeyError, TypeError: it is damaged.
    """
    if not exists(folder / _FILE):
        columns = from_npz(read(folder / _OLD_FILE), folder / _OLD_FILE)
        columns.setdefault("record_end", np.zeros(len(columns["camera"]), np.int64))
        return Index(**columns)
    columns = json.loads(read(folder / _FILE))["columns"]
    arrays = {}
    for field in dataclasses.fields(Index):
        path, expected = folder / _FOLDER / f"{field.name}.npy", columns[field.name]
        local = os.fspath(path)
        if is_remote(path):
            local = _host_copy(path, int(expected["bytes"]), version)
        if os.path.getsize(local) != expected["bytes"] or (
            check and _checksum(local) != expected["crc32"]
        ):
            if is_remote(path):
                os.unlink(local)  # so that it is copied anew the next time
            raise UserError(f"{path} is not what was written")
        # As a plain view: memmap's own indexing is slow.
        arrays[field.name] = np.load(local, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return Index(**arrays)


def _host_copy(path: epath.Path, size: int, version: str) -> str:
    """A column's copy for all processes of this host, made by the first that asks for it."""
    default = Path(tempfile.gettempdir()) / f"flexavatar-{os.getuid()}"
    cache = Path(os.environ.get("FLEXAVATAR_CACHE", default))
    folder = cache / hashlib.sha256(f"{os.fspath(path.parent)} {version}".encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True)
    copy = folder / path.name
    with open(folder / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            with writing(copy) as unfinished, open(unfinished, "wb") as file:

                def copy_piece(begin: int) -> None:
                    piece = buckets.fetch(path, begin, min(begin + _PIECE, size))
                    os.pwrite(file.fileno(), piece, begin)

                with concurrent.futures.ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
                    list(pool.map(copy_piece, range(0, size, _PIECE)))
    return os.fspath(copy)


def _checksum(path: str) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
