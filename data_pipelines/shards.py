"""A prepared data set on disk: ArrayRecord shards in TFDS's layout, and an index beside them.

    DIR/<name>/
      settings.json                                 what the data set was prepared with
      <name>-train.array_record-00000-of-00012      a record a frame, a clip's frames together
      dataset_info.json, features.json              TFDS's metadata: `tfds.builder_from_directory`
      summary.json                                  counts, and what was left out
      index.npz                                     who, when and which camera; written last

`shard_writer.write_shards` makes such a folder, `PreparedSet` reads it. It may lie in the cloud
(see `files`): ArrayRecord itself knows local files only, so a remote shard is downloaded whole
when first read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import threading
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from data_pipelines.cache import local_copy
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.frame import Frame
from data_pipelines.numpy_files import from_npz
from data_pipelines.record import FrameError, decode_frame

_OPEN_READERS = 128  # per process; the usual limit is 1024 open files


def shard_name(name: str, shard: int, count: int) -> str:
    """File name of shard number `shard` of `count` of the data set `name`."""
    return f"{name}-train.array_record-{shard:05d}-of-{count:05d}"


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
      image_size: pixels a side of the smallest image.
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


class PreparedSet:
    """Random access to the frames of a prepared data set; may be pickled and shared by threads.

    Raises:
      UserError: if the folder, or one of its shards, is missing or unfinished
        (`MissingFileError`), the index is damaged, or a shard is not of the size that was written.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        if not (self.folder / "index.npz").exists():
            raise MissingFileError(
                f"{self.folder} holds no finished data set; prepare it with "
                f"`python -m data_pipelines.prepare`"
            )
        try:
            settings = (self.folder / "settings.json").read_bytes()
            index = (self.folder / "index.npz").read_bytes()
            self.settings = json.loads(settings)
            self.name: str = self.settings["name"]
            self.index = Index(**from_npz(index))
        except Exception as e:  # a damaged zip file raises errors of many kinds
            raise UserError(
                f"index.npz or settings.json of {self.folder} is damaged ({_first_line(e)}): copy "
                "it again, or delete the folder and prepare it again"
            ) from e
        self._version = hashlib.sha256(settings + index).hexdigest()
        self._check_shards()
        self._readers = _Readers()

    def __len__(self) -> int:
        return self.index.num_frames

    def record(self, i: int) -> bytes:
        """Record `i` as stored; raises `RecordError` if its shard cannot give it back."""
        shard = self.index.shard_of(i)
        place = i - int(self.index.shard_start[shard])
        try:
            return self._readers(self._shard(shard), self._version).read([place])[0]
        except Exception as e:  # ArrayRecord raises RuntimeError, IndexError and others
            raise self._bad(i, FrameError("record", f"it cannot be read ({_first_line(e)})")) from e

    def frame(self, i: int, size: int | None = None) -> Frame:
        """Frame `i`, resized to `size` pixels a side if given; raises `RecordError`."""
        record = self.record(i)
        try:
            frame = decode_frame(record, size)
            self._check_place(i, frame)
        except FrameError as e:
            raise self._bad(i, e) from e
        return frame

    def _check_place(self, i: int, frame: Frame) -> None:
        """Raises `FrameError` if the index holds another frame at `i`: a shard of other origin."""
        index, clip = self.index, self.index.clip_of(i)
        expected = {
            "person": index.person[clip],
            "sequence": index.sequence[clip],
            "camera": index.camera_names[index.camera[i]],
            "timestep": index.timestep[i],
            "source": index.source[clip],
        }
        for field, value in expected.items():
            if getattr(frame, field) != value:
                raise FrameError(field, f"it is {getattr(frame, field)}, by the index {value}")

    def _bad(self, i: int, fault: FrameError) -> RecordError:
        shard = self.index.shard_of(i)
        return RecordError(
            os.fspath(self._shard(shard)), i - int(self.index.shard_start[shard]), fault
        )

    def _shard(self, shard: int) -> epath.Path:
        return self.folder / shard_name(self.name, shard, len(self.index.shard_bytes))

    def _check_shards(self) -> None:
        def size(shard: int) -> int | None:
            try:
                return self._shard(shard).stat().length
            except FileNotFoundError:
                return None

        expected = self.index.shard_bytes
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for shard, found in enumerate(pool.map(size, range(len(expected)))):
                if found is None:
                    raise MissingFileError(
                        f"shard {self._shard(shard)} is missing: copy it again, or delete the "
                        "folder and prepare it again"
                    )
                if found != expected[shard]:
                    raise UserError(
                        f"shard {self._shard(shard)} is {found} bytes long where {expected[shard]} "
                        "were written: copy it again, or delete the folder and prepare it again"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = _Readers()


def open_at_size(folder: epath.PathLike, size: int) -> PreparedSet:
    """A prepared data set whose images are at least `size` pixels a side.

    Raises:
      UserError: as `PreparedSet`; or its images are smaller.
    """
    prepared = PreparedSet(folder)
    if prepared.index.image_size < size:
        raise UserError(
            f"{prepared.folder} holds images of {prepared.index.image_size} pixels, "
            f"data.image_size asks for {size}: prepare it at that size"
        )
    return prepared


class RecordError(UserError):
    """A record that is not what was written.

    Attributes:
      shard: path of its shard.
      record: its number within the shard.
      field, problem: what is wrong with it, as in `FrameError`.
    """

    def __init__(self, shard: str, record: int, fault: FrameError):
        super().__init__(f"record {record} of {shard}: {fault}")
        self.args = (shard, record, fault)  # of which pickle makes it again, in another process
        self.shard, self.record = shard, record
        self.field, self.problem = fault.field, fault.problem

    def __str__(self) -> str:
        return f"record {self.record} of {self.shard}: {self.field}: {self.problem}"


class _Readers:
    """Open ArrayRecord readers by path, the least recently used closed beyond a limit."""

    def __init__(self):
        self._open: collections.OrderedDict[epath.Path, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, path: epath.Path, version: str) -> Any:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
            else:
                # A dropped reader closes itself once the threads that read from it are done.
                self._open[path] = array_record_module.ArrayRecordReader(
                    local_copy(path, version), options="readahead_buffer_size:0"
                )
                if len(self._open) > _OPEN_READERS:
                    self._open.popitem(last=False)
            return self._open[path]


def _first_line(e: Exception) -> str:
    return str(e).split("\n")[0]
