"""Measures an index of a hundred million frames: `python -m data_pipelines.index_benchmark`.

Writes the index of a data set that does not exist, and measures how long it takes to open, what
memory worker processes need that read it at the same time, and how long drawing an example's frames
takes. Of the clips every other one is multi-view.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_pipelines.errors import UserError, report_error
from data_pipelines.files import make_writable
from data_pipelines.frame import MONOCULAR, MULTI_VIEW
from data_pipelines.index import Index, index_version, read_index, write_index
from data_pipelines.sampling import shuffled, target_candidates
from data_pipelines.shard_plan import MAX_CLIPS_PER_SHARD

CAMERAS, TARGETS, JAW_TEMPERATURE = 16, 5, 3.0
DRAWN = 2000  # examples a worker


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.index_benchmark", description="Measures a large index."
    )
    parser.add_argument("--frames", type=float, default=1e8, help="(default: %(default)g)")
    parser.add_argument("--clips", type=float, default=2e5, help="(default: %(default)g)")
    parser.add_argument("--workers", type=int, default=8, help="processes (default: %(default)s)")
    parser.add_argument("--dir", help="folder with room for it (default: a temporary one)")
    args = parser.parse_args(argv)
    try:
        if not 1 <= args.clips <= args.frames or args.workers < 1:
            raise UserError(
                "expected --frames of at least --clips, --clips and --workers from 1 on"
            )
        if args.dir:
            make_writable(args.dir)
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            report(epath.Path(folder), int(args.frames), int(args.clips), args.workers)
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


def report(folder: epath.Path, frames: int, clips: int, workers: int) -> None:
    """Writes an index into `folder`, measures, and prints."""
    write_index(folder, simulated(frames, clips))
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(f"index of {frames} frames in {clips} clips: {size / 2**30:.2f} GiB on disk")
    start = time.perf_counter()
    read_index(folder, _version(folder))
    print(f"opened, its checksums compared, in {time.perf_counter() - start:.2f} s")
    spawn = multiprocessing.get_context("spawn")
    everyone = spawn.Barrier(workers)
    results = spawn.SimpleQueue()
    processes = [
        spawn.Process(target=use_index, args=(folder, seed, everyone, results))
        for seed in range(workers)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    opened, drawn, private, mapped = np.array(found).T
    print(
        f"{workers} workers: each opened it in {opened.max():.3f} s and has "
        f"{private.max() / 2**20:.0f} MiB more of its own; of the file they share "
        f"{mapped.sum() / 2**30:.2f} GiB, which the system takes back where memory is short"
    )
    print(f"an example's frames are drawn in {1e6 * np.median(drawn):.0f} us")


def simulated(frames: int, clips: int) -> Index:
    """The index of a data set that does not exist, its clips of equal length."""
    rng = np.random.default_rng(0)
    clip_start = np.linspace(0, frames, clips + 1).astype(np.int64)
    names = np.char.add("clip_", np.arange(clips).astype(str))
    shards = np.arange(0, clips + MAX_CLIPS_PER_SHARD, MAX_CLIPS_PER_SHARD).clip(max=clips)
    shard_start = clip_start[np.unique(shards)]
    length, number = np.diff(clip_start), np.arange(frames)
    multi_view = np.arange(clips) % 2 == 1
    in_clip = number - np.repeat(clip_start[:-1], length)
    in_shard = number - np.repeat(shard_start[:-1], np.diff(shard_start))
    cameras = np.where(np.repeat(multi_view, length), CAMERAS, 1)
    return Index(
        clip_start=clip_start,
        person=names,
        sequence=names,
        source=np.where(multi_view, MULTI_VIEW, MONOCULAR).astype(np.int8),
        camera_names=np.char.add("cam", np.arange(CAMERAS).astype(str)),
        camera=in_clip % cameras,
        timestep=in_clip // cameras,
        jaw=rng.random(frames, np.float32) * 0.4,
        shard_start=shard_start,
        shard_bytes=np.diff(shard_start) * 100_000,
        record_end=(in_shard + 1) * 100_000,
        image_size=np.array(512),
    )


def use_index(folder: epath.Path, seed: int, everyone: Any, results: Any) -> None:
    """What a worker does: it opens the index and draws examples from all over it.

    Args:
      folder: of the index.
      seed: of what is drawn.
      everyone: a barrier of all workers, so that their memory is counted while all have the index.
      results: queue for seconds to open, seconds a draw in the median, bytes of memory of this
        process's own that it took, and bytes that are this process's share of the mapped files.
    """
    before, _ = _memory(folder)
    start = time.perf_counter()
    index = read_index(folder, _version(folder), check=False)
    opened = time.perf_counter() - start
    rng = np.random.default_rng(seed)
    times = []
    for n in range(DRAWN):
        start = time.perf_counter()
        record = shuffled(n, index.num_frames, seed)
        target_candidates(index, record, TARGETS, JAW_TEMPERATURE, rng)
        times.append(time.perf_counter() - start)
    everyone.wait()
    private, mapped = _memory(folder)
    results.put((opened, np.median(times), private - before, mapped))
    everyone.wait()


def _memory(folder: epath.Path) -> tuple[int, int]:
    """Bytes of this process's own, and its share of the mapped files of `folder`."""
    smaps = Path("/proc/self/smaps").read_text()
    private = mapped = 0
    inside = False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Pss:"):
            mapped += int(line.split()[1]) * 1024
        elif not inside and line.startswith("Private_"):
            private += int(line.split()[1]) * 1024
    return private, mapped


def _version(folder: epath.Path) -> str:
    return index_version(folder).decode()


if __name__ == "__main__":
    sys.exit(main())
