"""A prepared data set on disk: ArrayRecord shards in TFDS's layout, and an index beside them.

    DIR/<name>/
      settings.json                        what the data set was prepared with
      <name>-train.array_record-00000      a record a frame, a clip's frames together
      dataset_info.json, features.json     TFDS's metadata: `tfds.builder_from_directory`
      summary.json                         counts, and what was left out
      clips.json                           which clip is in which shard
      parts/00000.npz                      each shard's part of the index, for growing
      index/*.npy, index.json              who, when and which camera; written last

`shard_writer.write_shards` makes such a folder, `PreparedSet` reads it. It may lie in the cloud
(see `files`): of a shard there only the records that are needed are fetched (see `ranges`).
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import threading
from typing import Any

from array_record.python import array_record_module
from etils import epath

from data_pipelines.buckets import BucketError
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import file_sizes, is_remote, read
from data_pipelines.frame import Frame
from data_pipelines.index import index_version, is_finished, read_index
from data_pipelines.ranges import FIRST_RECORD, read_record
from data_pipelines.record import FrameError, decode_frame
from data_pipelines.shard_plan import old_shard_name, shard_name

_OPEN_READERS = 128  # per process; the usual limit is 1024 open files


class PreparedSet:
    """Random access to the frames of a prepared data set; may be pickled and shared by threads.

    Raises:
      UserError: if the folder, or one of its shards, is missing or unfinished
        (`MissingFileError`), the index is damaged, or a shard is not of the size that was written.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        if not is_finished(self.folder):
            raise MissingFileError(
                f"{self.folder} holds no finished data set; prepare it with "
                f"`python -m data_pipelines.prepare`"
            )
        try:
            settings = read(self.folder / "settings.json")
            self.settings = json.loads(settings)
            self.name: str = self.settings["name"]
            self._version = hashlib.sha256(settings + index_version(self.folder)).hexdigest()
            self.index = read_index(self.folder, self._version)
        except BucketError:
            raise
        except Exception as e:  # damage raises errors of many kinds
            raise UserError(
                f"the index or settings.json of {self.folder} is damaged ({_first_line(e)}): copy "
                "it again, or delete the folder and prepare it again"
            ) from e
        self._check_shards()
        self._readers = _Readers()

    def __len__(self) -> int:
        return self.index.num_frames

    def record(self, i: int) -> bytes:
        """Record `i` as stored.

        Raises:
          RecordError: its shard cannot give it back.
          UserError: its shard, in the cloud, cannot be reached, or its place there is not known.
        """
        shard = self.index.shard_of(i)
        place = i - int(self.index.shard_start[shard])
        end = int(self.index.record_end[i])
        try:
            if is_remote(self.folder):
                if not end:
                    raise UserError(
                        f"{self.folder} was prepared before the places of records were noted, by "
                        "which they are read from a bucket: run `python -m data_pipelines.reindex "
                        f"{self.folder}` once"
                    )
                begin = int(self.index.record_end[i - 1]) if place else FIRST_RECORD
                return read_record(self.shard(shard), begin, end)
            return self._readers(self.shard(shard)).read([place])[0]
        except UserError:
            raise  # the network's fault, not the record's
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
            os.fspath(self.shard(shard)), i - int(self.index.shard_start[shard]), fault
        )

    def shard(self, shard: int) -> epath.Path:
        """The file of a shard."""
        if shard in self._of_old_name:
            return self.folder / old_shard_name(self.name, shard, len(self.index.shard_bytes))
        return self.folder / shard_name(self.name, shard)

    def _check_shards(self) -> None:
        expected, found = self.index.shard_bytes, file_sizes(self.folder)
        self._of_old_name = {
            shard
            for shard in range(len(expected))
            if shard_name(self.name, shard) not in found
            and old_shard_name(self.name, shard, len(expected)) in found
        }
        for shard, size in enumerate(expected.tolist()):
            path = self.shard(shard)
            if path.name not in found:
                raise MissingFileError(
                    f"shard {path} is missing: copy it again, or delete the folder and prepare it "
                    "again"
                )
            if found[path.name] != size:
                raise UserError(
                    f"shard {path} is {found[path.name]} bytes long where {size} were written: "
                    "copy it again, or delete the folder and prepare it again"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.index = read_index(self.folder, self._version, check=False)
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

    def __call__(self, path: epath.Path) -> Any:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
            else:
                # A dropped reader closes itself once the threads that read from it are done.
                self._open[path] = array_record_module.ArrayRecordReader(
                    os.fspath(path), options="readahead_buffer_size:0"
                )
                if len(self._open) > _OPEN_READERS:
                    self._open.popitem(last=False)
            return self._open[path]


def _first_line(e: Exception) -> str:
    return str(e).split("\n")[0]
