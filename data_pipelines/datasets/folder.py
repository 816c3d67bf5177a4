"""Any folder of portraits and videos tracked with Pixel3DMM: `prepare folder --source DIR`.

    SOURCE/inputs/NAME.jpg, NAME.mp4, or a folder NAME/ of pictures
    SOURCE/processing/NAME/..., SOURCE/tracking/NAME/...

Every name counts as a person of its own.
"""

from __future__ import annotations

import argparse
import os

from etils import epath

from data_pipelines.captures import CaptureSet
from data_pipelines.datasets import tracked_videos
from data_pipelines.datasets.tracked_videos import Clip, TrackedVideos
from data_pipelines.errors import MissingFileError
from data_pipelines.tracker_folders import list_inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tracked_videos.add_arguments(parser)
    parser.add_argument("--name", default="folder", help="of the prepared data set")


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    inputs = list_inputs(args.source)
    source = epath.Path(args.source)
    clips = tuple(
        Clip(name, name, os.fspath(path.relative_to(source))) for name, path in inputs.items()
    )
    if not clips:
        raise MissingFileError(f"{args.source}/inputs: no pictures or videos in it.")
    return [TrackedVideos(args.name, args.source, clips, args.every)]
