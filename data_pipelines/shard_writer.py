"""Writes captures into shards: in parallel, resumably, the same bytes whatever the workers."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tqdm import tqdm

from data_pipelines.cameras import rotation_from_6d
from data_pipelines.captures import CaptureSet, SkipClip, SkippedFrame
from data_pipelines.errors import GIVE_UP, TRY_AGAIN, MissingFileError, UserError
from data_pipelines.files import write, writing
from data_pipelines.frame import EXPRESSION_SIZE, Frame, expression_part
from data_pipelines.index import Index, is_finished, remove_index, write_index
from data_pipelines.numpy_files import from_npz, to_npz
from data_pipelines.ranges import record_ends
from data_pipelines.record import FIELDS, QUALITY, FrameError, encode_frame
from data_pipelines.shard_plan import (
    Plan,
    grown,
    read_plan,
    rename_shards,
    shard_name,
    split,
    unique_names,
    write_plan,
)
from data_pipelines.shards import PreparedSet

_WRITER_OPTIONS = "group_size:1,uncompressed"  # random access to single, already compressed, images

# A shard's part of the index, kept until all shards are written and nothing is left out.
_CLIP_COLUMNS = {"person": str, "sequence": str, "source": np.int8, "length": np.int64}
_FRAME_COLUMNS = {"camera": str, "timestep": np.int32, "jaw": np.float32, "size": np.int64}
_LEFT_OUT_COLUMNS = {"clips_left_out": str, "frames_left_out": str}
_COLUMNS = {
    **_CLIP_COLUMNS,
    **_FRAME_COLUMNS,
    **_LEFT_OUT_COLUMNS,
    "names_left_out": str,
    "record_end": np.int64,
    "num_bytes": np.int64,
}
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


@dataclasses.dataclass(frozen=True)
class Part:
    """One machine's share of a preparation: every `count`-th shard, from number `number` - 1 on."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UserError(f"--part is {self}; expected K/N with K from 1 to N, such as 3/64")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def of(cls, text: str) -> Part:
        """A part from "3/64"; raises `UserError`."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise UserError(f"--part is {text!r}; expected K/N, such as 3/64")
        return cls(int(number), int(count))

    def takes(self, shard: int) -> bool:
        return shard % self.count == self.number - 1


ALL = Part(1, 1)


def write_shards(
    captures: CaptureSet,
    root: epath.PathLike,
    settings: dict[str, Any] | None = None,
    workers: int = 1,
    quality: int = QUALITY,
    retry: bool = False,
    part: Part = ALL,
) -> Summary | None:
    """Prepares `captures` into the folder `root/<name>`.

    A killed call is continued by the same call: finished shards are kept. The folder's bytes do
    not depend on `workers`. A clip's encoded frames are held in memory until it is complete. Clips
    that `captures` has won since the folder was written are added to it.

    Which source a folder was prepared from is told by `settings` and the clips' names; the files
    themselves are not looked at again, so what was left out is tried again only if asked to.

    Args:
      captures: the clips to write.
      root: folder of prepared data sets, local or in the cloud.
      settings: JSON values on which the frames depend (size, seed, ...); stored in the folder.
      workers: processes; 1 works in this one.
      quality: JPEG quality.
      retry: write those shards again in which a clip or a frame was left out.
      part: of the work, for many machines that share a folder and have it each; when all parts are
        written, a call without it finishes the folder.

    Returns:
      What is in the folder; None for a part that leaves it unfinished.

    Raises:
      UserError: if the folder holds a data set prepared with other settings or a damaged one, a
        clip cannot be read for now (which names it), the disk is full, no frame is left, or a
        worker process was killed.
    """
    if not captures.name.isidentifier():
        raise UserError(f"data set name {captures.name!r}: expected a Python identifier")
    if captures.num_clips < 1:
        raise UserError(f"data set {captures.name} has no clips")
    folder = epath.Path(root) / captures.name
    names = unique_names(map(captures.clip_name, range(captures.num_clips)))
    settings = {"format": 1, "name": captures.name, **(settings or {}), "quality": quality}
    _claim(folder, json.loads(json.dumps(settings)), names)
    plan = read_plan(folder) or split(names)
    more = grown(folder, plan, names)
    parts = folder / "parts"
    finished = is_finished(folder)
    if finished:
        PreparedSet(folder)  # it is whole, or says what is wrong with it
        summary = Summary(**_read_summary(folder))
        retry &= bool(summary.clips_left_out or summary.frames_left_out)
    if not finished or retry or len(more) > len(plan):
        remove_index(folder)  # first: without it the folder is unfinished
        plan = more
        write_plan(folder, plan)
        parts.mkdir(parents=True, exist_ok=True)
        rename_shards(folder, captures.name, len(plan))
        mine = [shard for shard in range(len(plan)) if part.takes(shard)]
        _clean(parts, mine, retry)
        job = _ShardJob(captures, os.fspath(folder), plan, names, quality)
        with tqdm(
            total=sum(len(plan[shard]) for shard in mine), desc=captures.name, unit="clip"
        ) as bar:
            for clips in _map(job, mine, workers):
                bar.update(clips)
        if part != ALL:
            return None
        _finish(folder, [_read_part(parts, shard) for shard in range(len(plan))])
    return Summary(**_read_summary(folder))


def _clean(parts: epath.Path, shards: list[int], retry: bool) -> None:
    """Removes what a killed process left of `shards`, and what is to be tried again."""
    for path in parts.iterdir():
        found = re.search(r"^\.\d+\..*-(\d{5})-of-|^\.\d+\.(\d{5})\.npz$|^(\d{5})\.npz$", path.name)
        if not found or int(next(filter(None, found.groups()))) not in shards:
            continue
        if path.name.startswith("."):
            path.unlink(missing_ok=True)
        elif retry:
            columns = from_npz(path.read_bytes(), path)
            if any(len(columns[name]) for name in _LEFT_OUT_COLUMNS):
                path.unlink()


def _read_part(parts: epath.Path, shard: int) -> dict[str, np.ndarray]:
    path = parts / f"{shard:05d}.npz"
    columns = from_npz(path.read_bytes(), path)
    # Written before clips that are left out were named.
    columns.setdefault("names_left_out", np.full(len(columns["clips_left_out"]), "?"))
    columns.setdefault("record_end", np.zeros(len(columns["camera"]), np.int64))
    return columns


def _read_summary(folder: epath.Path) -> dict[str, Any]:
    summary = _read_json(folder / "summary.json")
    summary["clips_left_out"] = {  # once counts, not names
        reason: names if isinstance(names, list) else ["?"] * names
        for reason, names in summary["clips_left_out"].items()
    }
    return summary


def _hash(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def _claim(folder: epath.Path, settings: dict[str, Any], names: list[str]) -> None:
    """Notes the settings in a new folder; raises `UserError` if it has other ones."""
    path = folder / "settings.json"
    if path.exists():
        found = _read_json(path)
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
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} holds files that are no prepared data set: choose another folder"
        )
    else:
        write(path, json.dumps(settings, indent=2))


def _read_json(path: epath.Path) -> dict[str, Any]:
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


@dataclasses.dataclass(frozen=True)
class _ShardJob:
    """Writes one shard and its part of the index; done in whichever process."""

    captures: CaptureSet
    folder: str
    plan: Plan
    names: list[str]
    quality: int

    def __call__(self, shard: int) -> int:
        """Writes shard number `shard` unless it is there; returns its number of clips."""
        folder, clips = epath.Path(self.folder), self.plan[shard]
        part = folder / "parts" / f"{shard:05d}.npz"
        if part.exists():  # written after its shard
            return len(clips)
        columns: dict[str, list] = {name: [] for name in _COLUMNS}
        name = shard_name(self.captures.name, shard, len(self.plan))
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
        write(part, to_npz({k: np.array(columns[k], dtype) for k, dtype in _COLUMNS.items()}))
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
        for name, values in zip(_FRAME_COLUMNS, zip(*frames, strict=True), strict=True):
            columns[name] += values
        for name, value in zip(_CLIP_COLUMNS, (*clip.pop(), len(frames)), strict=True):
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


def _finish(folder: epath.Path, parts: list[dict[str, np.ndarray]]) -> None:
    """Writes metadata, summary and, last, the index of a folder whose shards are all there."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}
    shard_frames = [int(part["length"].sum()) for part in parts]
    summary = Summary(
        people=len(set(columns["person"])),
        clips=len(columns["person"]),
        frames=sum(shard_frames),
        clips_left_out=_by_reason(columns["clips_left_out"], columns["names_left_out"]),
        frames_left_out=dict(collections.Counter(columns["frames_left_out"].tolist())),
    )
    if summary.frames == 0:
        reasons = "; ".join(str(summary).split("\n")[1:])
        raise UserError(
            f"no frame is left to write to {folder}: {reasons}; correct that and give the same "
            "command with --retry"
        )
    camera_names, camera = np.unique(columns["camera"], return_inverse=True)
    index = Index(
        clip_start=starts(columns["length"]),
        person=columns["person"],
        sequence=columns["sequence"],
        source=columns["source"],
        camera_names=camera_names,
        camera=camera.astype(np.int32),
        timestep=columns["timestep"],
        jaw=columns["jaw"],
        shard_start=starts(shard_frames),
        shard_bytes=columns["num_bytes"],
        record_end=columns["record_end"],
        image_size=columns["size"].min(),
    )
    _write_tfds_metadata(folder, shard_frames, index.shard_bytes)
    write(folder / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2).encode())
    write_index(folder, index)


def _by_reason(reasons: np.ndarray, names: np.ndarray) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for reason, name in zip(reasons.tolist(), names.tolist(), strict=True):
        found.setdefault(reason, []).append(name)
    return found


def _write_tfds_metadata(
    folder: epath.Path, shard_frames: list[int], shard_bytes: np.ndarray
) -> None:
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features={
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "cam2head": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
            "K": tfds.features.Tensor(shape=(3, 3), dtype=np.float32),
            "expression": tfds.features.Tensor(shape=(EXPRESSION_SIZE,), dtype=np.float32),
            "person": tfds.features.Text(),
            "sequence": tfds.features.Text(),
            "timestep": tfds.features.Scalar(dtype=np.int64),
            "camera": tfds.features.Text(),
            "source": tfds.features.Scalar(dtype=np.int64),
            "checksums": tfds.features.Tensor(shape=(len(FIELDS),), dtype=np.int64),
        },
        split_infos=[
            tfds.core.SplitInfo(
                name="train", shard_lengths=shard_frames, num_bytes=int(sum(shard_bytes))
            )
        ],
        check_data=False,
    )


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


_job: _ShardJob | None = None
"""What this process is to write, sent once instead of with every shard."""


def _start(job: _ShardJob) -> None:
    global _job
    _job = job


def _write_shard(shard: int) -> int:
    return _job(shard)


def _map(job: _ShardJob, shards: list[int], workers: int) -> Iterator[int]:
    """`job(shard)` for each of `shards`, in any order, by so many processes."""
    if workers <= 1:
        yield from map(job, shards)
        return
    # Not fork: JAX and other libraries run threads.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_start, initargs=(job,)
    ) as pool:
        try:
            futures = [pool.submit(_write_shard, shard) for shard in shards]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.BrokenExecutor as e:
            raise UserError(
                "a worker process was killed (out of memory?): the same command goes on from here, "
                "with fewer --workers if need be",
                status=TRY_AGAIN,
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)


def starts(lengths: Iterable[int]) -> np.ndarray:
    """[n+1] where each of n runs of these lengths starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
