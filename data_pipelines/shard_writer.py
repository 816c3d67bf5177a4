"""Writes captures into shards: in parallel, resumably, the same bytes whatever the workers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from tqdm import tqdm

from data_pipelines.captures import CaptureSet
from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.finishing import finish
from data_pipelines.index import is_finished, remove_index
from data_pipelines.numpy_files import from_npz
from data_pipelines.prepared_folder import Summary, claim, read_summary
from data_pipelines.record import QUALITY
from data_pipelines.shard_job import ShardJob
from data_pipelines.shard_parts import LEFT_OUT_COLUMNS, complete_parts
from data_pipelines.shard_plan import (
    grown,
    read_plan,
    rename_old_shards,
    split,
    unique_names,
    write_plan,
)
from data_pipelines.shards import PreparedSet


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

_OF_A_SHARD = r"^\.\d+\..*-(\d{5,})(?:-of-\d+)?$|^(?:\.\d+\.)?(\d{5,})\.npz$"
"""Names of parts, and of what is not finished, with the number of the shard."""


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
    claim(folder, json.loads(json.dumps(settings)), names)
    plan = read_plan(folder) or split(names)
    more = grown(folder, plan, names)
    parts = folder / "parts"
    finished = is_finished(folder)
    if finished:
        prepared = PreparedSet(folder)  # it is whole, or says what is wrong with it
        summary = Summary(**read_summary(folder))
        retry &= bool(summary.clips_left_out or summary.frames_left_out)
    if not finished or retry or len(more) > len(plan):
        parts.mkdir(parents=True, exist_ok=True)
        if finished:
            complete_parts(prepared)
        remove_index(folder)  # first: without it the folder is unfinished
        plan = more
        write_plan(folder, plan)
        rename_old_shards(folder, captures.name)
        mine = [shard for shard in range(len(plan)) if part.takes(shard)]
        _clean(parts, mine, retry)
        job = ShardJob(captures, os.fspath(folder), plan, names, quality)
        with tqdm(
            total=sum(len(plan[shard]) for shard in mine), desc=captures.name, unit="clip"
        ) as bar:
            for clips in _map(job, mine, workers):
                bar.update(clips)
        if part != ALL:
            return None
        finish(folder, len(plan))
    return Summary(**read_summary(folder))


def _clean(parts: epath.Path, shards: list[int], retry: bool) -> None:
    """Removes what a killed process left of `shards`, and what is to be tried again."""
    for path in parts.iterdir() if parts.is_dir() else ():
        found = re.search(_OF_A_SHARD, path.name)
        if not found or int(next(filter(None, found.groups()))) not in shards:
            continue
        if path.name.startswith("."):
            path.unlink(missing_ok=True)
        elif retry:
            columns = from_npz(path.read_bytes(), path)
            if any(len(columns[name]) for name in LEFT_OUT_COLUMNS):
                path.unlink()


_job: ShardJob | None = None
"""What this process is to write, sent once instead of with every shard."""


def _start(job: ShardJob) -> None:
    global _job
    _job = job


def _write_shard(shard: int) -> int:
    return _job(shard)


def _map(job: ShardJob, shards: list[int], workers: int) -> Iterator[int]:
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
