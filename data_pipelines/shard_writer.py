"""Writes captures into shards: in parallel, resumably, the same bytes whatever the workers."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tqdm import tqdm

from data_pipelines.cameras import rotation_from_6d
from data_pipelines.captures import CaptureSet, SkipClip, SkippedFrame
from data_pipelines.errors import TRY_AGAIN, MissingFileError, UserError
from data_pipelines.files import write, writing
from data_pipelines.frame import EXPRESSION_SIZE, expression_part
from data_pipelines.numpy_files import from_npz, to_npz
from data_pipelines.record import FIELDS, QUALITY, FrameError, encode_frame
from data_pipelines.shards import Index, PreparedSet, shard_name

MAX_CLIPS_PER_SHARD = 16
_WRITER_OPTIONS = "group_size:1,uncompressed"  # random access to single, already compressed, images

# A shard's part of the index, kept until all shards are written and nothing is left out.
_CLIP_COLUMNS = {"person": str, "sequence": str, "source": np.int8, "length": np.int64}
_FRAME_COLUMNS = {"camera": str, "timestep": np.int32, "jaw": np.float32, "size": np.int64}
_LEFT_OUT_COLUMNS = {"clips_left_out": str, "frames_left_out": str}
_COLUMNS = {**_CLIP_COLUMNS, **_FRAME_COLUMNS, **_LEFT_OUT_COLUMNS, "num_bytes": np.int64}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `write_shards` put into a folder, and what it left out."""

    people: int
    clips: int
    frames: int
    clips_left_out: dict[str, int]
    frames_left_out: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.people} people, {self.clips} clips, {self.frames} frames"]
        for kind, reasons in (("clips", self.clips_left_out), ("frames", self.frames_left_out)):
            lines += [f"left out {n} {kind}: {reason}" for reason, n in sorted(reasons.items())]
        return "\n".join(lines)


def write_shards(
    captures: CaptureSet,
    root: epath.PathLike,
    settings: dict[str, Any] | None = None,
    workers: int = 1,
    quality: int = QUALITY,
    retry: bool = False,
) -> Summary:
    """Prepares `captures` into the folder `root/<name>`.

    A killed call is continued by the same call: finished shards are kept. The folder's bytes do
    not depend on `workers`. A clip's encoded frames are held in memory until it is complete.

    Which source a folder was prepared from is told by `settings` and the clips' names; the files
    themselves are not looked at again, so what was left out is tried again only if asked to.

    Args:
      captures: the clips to write.
      root: folder of prepared data sets, local or in the cloud.
      settings: JSON values on which the frames depend (size, seed, ...); stored in the folder.
      workers: processes; 1 works in this one.
      quality: JPEG quality.
      retry: write those shards again in which a clip or a frame was left out.

    Raises:
      ValueError: if the folder holds a data set prepared with other settings or a damaged one, a
        clip cannot be read (which names it), or no frame is left.
      FileNotFoundError: if the folder holds a finished data set that lacks a file.
      ChildProcessError: if a worker process was killed.
    """
    if not captures.name.isidentifier():
        raise UserError(f"data set name {captures.name!r}: expected a Python identifier")
    if captures.num_clips < 1:
        raise UserError(f"data set {captures.name} has no clips")
    folder = epath.Path(root) / captures.name
    settings = {
        "format": 1,
        "name": captures.name,
        **(settings or {}),
        "clips": f"{captures.num_clips} (names hashed: {_hash_names(captures)})",
        "quality": quality,
    }
    _claim(folder, json.loads(json.dumps(settings)))
    parts = folder / "parts"
    finished = (folder / "index.npz").exists()
    if finished:
        PreparedSet(folder)  # it is whole, or says what is wrong with it
    if not finished or (retry and parts.exists()):
        parts.mkdir(parents=True, exist_ok=True)
        for rubbish in parts.glob(".*"):  # of a process that was killed
            rubbish.unlink()
        if retry:
            _forget_incomplete(folder)
        shards = _plan(captures.num_clips)
        job = _ShardJob(captures, os.fspath(folder), shards, quality)
        with tqdm(total=captures.num_clips, desc=captures.name, unit="clip") as bar:
            for clips in _map(job, len(shards), workers):
                bar.update(clips)
        _finish(
            folder, [from_npz((parts / f"{i:05d}.npz").read_bytes()) for i in range(len(shards))]
        )
    summary = Summary(**_read_json(folder / "summary.json"))
    if parts.exists() and not (summary.clips_left_out or summary.frames_left_out):
        parts.rmtree()
    return summary


def _hash_names(captures: CaptureSet) -> str:
    names = "\n".join(captures.clip_name(i) for i in range(captures.num_clips))
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def _forget_incomplete(folder: epath.Path) -> None:
    """Takes shards that left something out for not written yet."""
    (folder / "index.npz").unlink(missing_ok=True)  # first: without it the folder is unfinished
    for part in (folder / "parts").glob("*.npz"):
        columns = from_npz(part.read_bytes())
        if any(len(columns[name]) for name in _LEFT_OUT_COLUMNS):
            part.unlink()


def _claim(folder: epath.Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new folder; raises `ValueError` if it has other ones."""
    path = folder / "settings.json"
    if path.exists():
        found = _read_json(path)
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
        folder.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(settings, indent=2).encode())


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


def _plan(num_clips: int) -> list[range]:
    """The clips of each shard: at least 16 shards where there are as many clips."""
    step = max(1, min(MAX_CLIPS_PER_SHARD, num_clips // 16))
    return [range(i, min(i + step, num_clips)) for i in range(0, num_clips, step)]


@dataclasses.dataclass(frozen=True)
class _ShardJob:
    """Writes one shard and its part of the index; done in whichever process."""

    captures: CaptureSet
    folder: str
    shards: list[range]
    quality: int

    def __call__(self, shard: int) -> int:
        """Writes shard number `shard` unless it is there; returns its number of clips."""
        folder, clips = epath.Path(self.folder), self.shards[shard]
        part = folder / "parts" / f"{shard:05d}.npz"
        if part.exists():  # written after its shard
            return len(clips)
        columns: dict[str, list] = {name: [] for name in _COLUMNS}
        name = shard_name(self.captures.name, shard, len(self.shards))
        with writing(folder / name, part.parent) as path:
            writer = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
            for i in clips:
                try:
                    for record in self._encode_clip(i, columns):
                        writer.write(record)
                except SkipClip as e:
                    columns["clips_left_out"].append(str(e))
                except (UserError, OSError) as e:
                    status = e.status if isinstance(e, UserError) else TRY_AGAIN
                    clip = self.captures.clip_name(i)
                    raise UserError(
                        f"clip {clip} of {self.captures.name}: {e}", status=status
                    ) from e
            writer.close()
            columns["num_bytes"].append(path.stat().st_size)
        write(part, to_npz({k: np.array(columns[k], dtype) for k, dtype in _COLUMNS.items()}))
        return len(clips)

    def _encode_clip(self, i: int, columns: dict[str, list]) -> list[bytes]:
        """Records of clip `i`, complete before it is added to `columns`; raises `SkipClip`."""
        records, frames, left_out, clip = [], [], [], set()
        for frame in self.captures.clip(i):
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
            raise UserError("it mixes people, sequences or sources")
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
        **{k: dict(collections.Counter(columns[k].tolist())) for k in _LEFT_OUT_COLUMNS},
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
        image_size=columns["size"].min(),
    )
    _write_tfds_metadata(folder, shard_frames, index.shard_bytes)
    write(folder / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2).encode())
    write(folder / "index.npz", to_npz(dataclasses.asdict(index)))


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


def _map(job: _ShardJob, count: int, workers: int) -> Iterator[int]:
    """`job(i)` for i below `count`, in any order, by so many processes."""
    if workers <= 1:
        yield from map(job, range(count))
        return
    # Not fork: JAX and other libraries run threads.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        try:
            futures = [pool.submit(job, i) for i in range(count)]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.BrokenExecutor as e:
            raise UserError(
                "a worker process was killed (out of memory?): the same command goes on from here, "
                "with fewer --workers if need be"
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)


def starts(lengths: Iterable[int]) -> np.ndarray:
    """[n+1] where each of n runs of these lengths starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
