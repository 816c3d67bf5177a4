"""Writes one shard and its part of the index, in whichever process."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from data_pipelines.cameras import rotation_from_6d
from data_pipelines.captures import CaptureSet, SkipClip, SkippedFrame
from data_pipelines.errors import GIVE_UP, TRY_AGAIN, UserError
from data_pipelines.files import writing
from data_pipelines.frame import EXPRESSION_SIZE, Frame, expression_part
from data_pipelines.ranges import record_ends
from data_pipelines.record import FrameError, encode_frame
from data_pipelines.shard_parts import CLIP_COLUMNS, COLUMNS, FRAME_COLUMNS, part_file, write_part
from data_pipelines.shard_plan import Plan, shard_name

_WRITER_OPTIONS = "group_size:1,uncompressed"  # random access to single, already compressed, images


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Writes one shard and its part of the index; done in whichever process."""

    captures: CaptureSet
    folder: str
    plan: Plan
    names: list[str]
    quality: int

    def __call__(self, shard: int) -> int:
        """Writes shard number `shard` unless it is there; returns its number of clips."""
        folder, clips = epath.Path(self.folder), self.plan[shard]
        part = part_file(folder, shard)
        if part.exists():  # written after its shard
            return len(clips)
        columns: dict[str, list] = {name: [] for name in COLUMNS}
        name = shard_name(self.captures.name, shard)
        with writing(folder / name, part.parent) as path:
            writer = _Writer(path)
            for clip in clips:
                try:
                    writer.write(self._encode_clip(clip, columns))
                except SkipClip as e:
                    columns["clips_left_out"].append(str(e))
                    columns["names_left_out"].append(clip)
            writer.close()
            columns["num_bytes"].append(path.stat().st_size)
            columns["record_end"] = record_ends(path, len(columns["camera"]))
        write_part(folder, shard, columns)
        return len(clips)

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def _read_clip(self, clip: str) -> Iterator[Frame | SkippedFrame]:
        """Frames of a clip; raises `SkipClip` for one that can never be read, `UserError` else."""
        try:
            yield from self.captures.clip(self._number[clip])
        except UserError as error:
            if error.status == GIVE_UP:
                raise SkipClip(str(error)) from error
            raise
        except (ArithmeticError, np.linalg.LinAlgError) as error:
            raise SkipClip(f"its numbers cannot be calculated with ({error})") from error
        except MemoryError as error:
            raise SkipClip("it does not fit into memory") from error
        except OSError as error:
            raise UserError(
                f"clip {clip} of {self.captures.name} cannot be read ({error}); mend that, and the "
                "same command goes on from here",
                status=TRY_AGAIN,
            ) from error
        except Exception as error:
            error.add_note(f"in clip {clip} of {self.captures.name}")
            raise

    def _encode_clip(self, clip_name: str, columns: dict[str, list]) -> list[bytes]:
        """A clip's records, complete before it is added to `columns`; raises `SkipClip`."""
        records, frames, left_out, clip = [], [], [], set()
        for frame in self._read_clip(clip_name):
            if isinstance(frame, SkippedFrame):
                left_out.append(frame.reason)
                continue
            try:
                jaw = jaw_angle(frame.expression)
                records.append(encode_frame(frame, self.quality))
            except FrameError as e:
                left_out.append(str(e))
            else:
                frames.append((frame.camera, frame.timestep, jaw, frame.image.shape[0]))
                clip.add((frame.person, frame.sequence, frame.source))
        columns["frames_left_out"] += left_out
        if not clip:
            raise SkipClip("no frame is left")
        if len(clip) > 1:
            raise SkipClip("it mixes people, sequences or sources")
        for name, values in zip(FRAME_COLUMNS, zip(*frames, strict=True), strict=True):
            columns[name] += values
        for name, value in zip(CLIP_COLUMNS, (*clip.pop(), len(frames)), strict=True):
            columns[name].append(value)
        return records


def jaw_angle(expression: np.ndarray) -> float:
    """Angle in radians of the jaw's rotation in an expression code [135]; 0 is closed.

    Raises `FrameError` if the code has no rotation there.
    """
    if np.shape(expression) != (EXPRESSION_SIZE,):
        raise FrameError("expression", f"expected {EXPRESSION_SIZE} numbers")
    with np.errstate(invalid="ignore", divide="ignore"):
        R = rotation_from_6d(np.asarray(expression, np.float64)[expression_part("jaw")])
    if not np.isfinite(R).all():
        raise FrameError("expression", "its jaw is no rotation")
    return float(np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1)))


class _Writer:
    """An ArrayRecord file; what goes wrong on its disk is an `OSError`, as of other files."""

    def __init__(self, path: Path):
        self._path = path
        self._writer = self._trying(
            lambda: array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
        )

    def write(self, records: Iterable[bytes]) -> None:
        for record in records:
            self._trying(lambda record=record: self._writer.write(record))

    def close(self) -> None:
        self._trying(self._writer.close)

    def _trying(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split("\n")[0].split())) from error
