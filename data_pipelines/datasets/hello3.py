"""Hello3, the training videos of Hallo3: talking people in motion (Cui et al., CVPR 2025).

    SOURCE/videos/CLIP.mp4                                the unpacked videos.tgz
    SOURCE/processing/CLIP/..., SOURCE/tracking/CLIP/...  Pixel3DMM

Published: https://huggingface.co/datasets/fudan-generative-ai/hallo3_training_data. Assumed: every
clip shows a person of its own, as the data set names nobody.
"""

from __future__ import annotations

import argparse

from data_pipelines.captures import CaptureSet
from data_pipelines.datasets import tracked_videos
from data_pipelines.datasets.tracked_videos import Clip, TrackedVideos, require_folder
from data_pipelines.errors import MissingFileError
from data_pipelines.files import list_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tracked_videos.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    folder = require_folder(args.source, "videos") / "videos"
    videos = [path for path in list_folder(folder) if path.suffix == ".mp4"]
    if not videos:
        raise MissingFileError(f"{args.source}: no videos/*.mp4 in it; unpack videos.tgz there.")
    clips = tuple(Clip(path.stem, path.stem, f"videos/{path.name}") for path in videos)
    return [TrackedVideos("hello3", args.source, clips, args.every)]
