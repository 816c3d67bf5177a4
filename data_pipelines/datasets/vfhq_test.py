"""VFHQ-Test: 50 video clips for evaluation (Xie et al., VFHQ, CVPR Workshops 2022).

    SOURCE/CLIP/00000000.png, 00000001.png, ...           512x512, the ground truth of the test set
    SOURCE/processing/CLIP/..., SOURCE/tracking/CLIP/...  Pixel3DMM

Of each clip, 50 evenly spaced frames are taken, the first one included: by the protocol it is the
source of the avatar. Frames are whole pictures, as the clips are cropped to faces already.

Published: the frames' names, the names of the clips (Clip+VIDEO+P<person>+C<clip>+F<from>-<to>)
and the protocol. Assumed: the clips lie side by side in SOURCE, in the archive the folder
GT/Interval1_512x512_LANCZOS4.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from data_pipelines.captures import CaptureSet
from data_pipelines.datasets.tracked_videos import Clip, TrackedVideos, require_folder
from data_pipelines.errors import MissingFileError
from data_pipelines.files import list_folder
from data_pipelines.pixel3dmm import Portrait, TrackedClip

FRAMES_A_CLIP = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="folder of the data set")


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    source = require_folder(args.source)
    names = sorted(
        path.name
        for path in list_folder(source)
        if path.is_dir() and path.name not in ("processing", "tracking")
    )
    if not names:
        raise MissingFileError(f"{source}: no folders of frames in it.")
    clips = tuple(Clip(_person(name), name, name) for name in names)
    return [VfhqTest("vfhq_test", args.source, clips)]


@dataclasses.dataclass(frozen=True)
class VfhqTest(TrackedVideos):
    """Fifty whole pictures of every clip."""

    def timesteps(self, tracked: TrackedClip) -> list[int]:
        last = len(tracked.timesteps) - 1
        chosen = np.linspace(0, last, min(FRAMES_A_CLIP, last + 1)).round().astype(int)
        return [tracked.timesteps[i] for i in chosen]

    def portrait(self, tracked: TrackedClip, timestep: int, photo: np.ndarray) -> Portrait:
        return tracked.whole_photo(timestep, photo)


def _person(name: str) -> str:
    """The clip's person: one of a YouTube video, Clip+VIDEO+P<person>+..."""
    parts = name.split("+")
    return "+".join(parts[1:3]) if len(parts) >= 3 else name
