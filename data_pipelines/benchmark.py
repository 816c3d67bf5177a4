"""How fast prepared shards become batches: `python -m data_pipelines.benchmark DIR`.

Prints the time of each stage for an image on one core, images a second of the whole pipeline, and
with `--step-time` whether that feeds a training step. DIR is a prepared data set or a folder of
several, mixed in equal parts, local or in a bucket. With `--json` the figures are written to a file
for `data_pipelines.plan`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.errors import UserError, report_error
from data_pipelines.figures import Figures
from data_pipelines.files import is_remote, write
from data_pipelines.index import find_sets
from data_pipelines.mixture import make_iterator
from data_pipelines.record import decode_frame, parse_fields
from data_pipelines.sampling import target_candidates
from data_pipelines.shards import PreparedSet


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.benchmark", description="Measures the input pipeline."
    )
    parser.add_argument("dir", metavar="DIR", help="a prepared data set, or a folder of several")
    parser.add_argument("--size", type=int, help="pixels a side (default: as prepared)")
    parser.add_argument("--batch", type=int, default=20, help="examples a step (%(default)s)")
    parser.add_argument("--targets", type=int, default=5, help="targets an example (%(default)s)")
    parser.add_argument("--step-time", type=float, help="seconds of a training step to feed")
    parser.add_argument("--workers", type=int, default=0, help="processes (0: threads of this one)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where to write what was measured")
    args = parser.parse_args(argv)
    try:
        for option, least in (("size", 1), ("batch", 1), ("targets", 1), ("workers", 0)):
            value = getattr(args, option)
            if value is not None and value < least:
                raise UserError(f"--{option} is {value}; expected {least} or more")
        report(args)
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


def report(args: argparse.Namespace) -> None:
    """Measures as `args` say, and prints; raises ValueError or OSError for a bad folder."""
    folders = find_sets(args.dir)
    sets = [PreparedSet(folder) for folder in folders]
    size = args.size or min(int(prepared.index.image_size) for prepared in sets)
    print(f"{', '.join(s.name for s in sets)}: {sum(map(len, sets))} images, read at {size} pixels")

    figures = measure(sets, size, args.targets, args.seconds / 2)
    stages, total = figures.stages, figures.seconds
    slowest = max(stages, key=stages.get)
    for name, seconds in stages.items():
        mark = "  <- takes longest" if name == slowest else ""
        print(f"  {name:<8} {1e3 * seconds:7.3f} ms an image on one core{mark}")
    print(f"  together {1e3 * total:7.3f} ms: {1 / total:.0f} images/s a core")
    print(
        f"  a record has {figures.record_bytes / 1e3:.0f} kB and comes "
        f"{1e3 * figures.request_seconds:.1f} ms after it is asked for"
    )
    if args.json:
        write(args.json, json.dumps(dataclasses.asdict(figures), indent=2) + "\n")

    config = ConfigDict(
        {
            "root": os.fspath(folders[0].parent),
            "mixture": {prepared.name: 1 for prepared in sets},
            "targets": args.targets,
            "image_size": size,
            "jaw_temperature": 3.0,
            "jitter": {
                "probability": 0.8,
                "brightness": (1, 1),
                "contrast": (1, 1),
                "saturation": (1, 1),
                "hue": (0, 0),
            },
            "bad_records": "raise",
            "max_bad_fraction": 0.0,
            "workers": args.workers,
        }
    )
    speed = pipeline_speed(config, args.batch, args.seconds / 2)
    where = f"{args.workers} processes" if args.workers else "threads of one process"
    print(f"pipeline, {where}, on {os.cpu_count()} cores: {speed:.0f} images/s")
    if args.step_time:
        needed = args.batch * (1 + args.targets) / args.step_time
        verdict = "feeds" if speed >= needed else "does NOT feed"
        print(
            f"this {verdict} a step of {args.step_time:g} s with {args.batch} examples of "
            f"1 + {args.targets} images: {needed:.0f} images/s, {needed * total:.1f} cores' work"
        )


def measure(sets: list[PreparedSet], size: int, targets: int, seconds: float) -> Figures:
    """What an image costs, in the median of random images, read one after the other."""
    rng, times = np.random.default_rng(0), []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        prepared = sets[rng.integers(len(sets))]
        i = int(rng.integers(len(prepared)))
        draw, _ = _timed(lambda p=prepared, i=i: target_candidates(p.index, i, targets, 3.0, rng))
        asked = time.monotonic()
        read, record = _timed(lambda p=prepared, i=i: p.record(i))
        waited = time.monotonic() - asked
        verify, _ = _timed(lambda r=record: parse_fields(r))
        decode, _ = _timed(lambda r=record: decode_frame(r, size))
        times.append((draw / (1 + targets), read, verify, decode - verify, waited, len(record)))
    *stages, waited, record_bytes = np.median(times, axis=0).tolist()
    return Figures(
        machine=_processor(),
        data=[prepared.name for prepared in sets],
        remote=any(is_remote(prepared.folder) for prepared in sets),
        size=size,
        # decode: resizing and checks included
        stages=dict(zip(("draw", "read", "verify", "decode"), stages, strict=True)),
        record_bytes=record_bytes,
        request_seconds=waited,
        worker_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _processor() -> str:
    """This machine's processor by its own name, where Linux says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pipeline_speed(config: ConfigDict, batch: int, seconds: float) -> float:
    """Images a second of wall-clock time that `make_iterator` yields once it runs."""
    iterator = make_iterator(config, seed=0, global_batch=batch)
    for _ in range(max(2, config.workers)):  # what is read ahead is not to be counted
        next(iterator)
    start, steps = time.monotonic(), 0
    while steps < 2 or time.monotonic() < start + seconds:
        next(iterator)
        steps += 1
    speed = steps * batch * (1 + config.targets) / (time.monotonic() - start)
    iterator.close()
    return speed


def _timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()  # a bucket's requests run in a thread of their own
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    sys.exit(main())
