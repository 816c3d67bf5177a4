"""CelebV-HQ: 35,666 video clips of 15,653 celebrities (Zhu et al., ECCV 2022).

    SOURCE/celebvhq_info.json                             {"clips": {CLIP: {"ytb_id": ..., ...}}}
    SOURCE/downloaded_celebvhq/processed/CLIP.mp4         as download_and_process.py writes them
    SOURCE/processing/CLIP/..., SOURCE/tracking/CLIP/...  Pixel3DMM

Published: the JSON file, the names of the clips and where the authors' script puts them
(https://github.com/CelebV-HQ/CelebV-HQ). Assumed: the clips of one YouTube video show one person.
"""

from __future__ import annotations

import argparse

from data_pipelines.captures import CaptureSet
from data_pipelines.datasets import tracked_videos
from data_pipelines.datasets.tracked_videos import Clip, TrackedVideos, read_json, require_folder
from data_pipelines.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tracked_videos.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    clips = downloaded_clips(args.source, "celebvhq_info.json", "downloaded_celebvhq/processed")
    return [TrackedVideos("celebv_hq", args.source, clips, args.every)]


def downloaded_clips(source: str, info: str, folder: str) -> tuple[Clip, ...]:
    """Clips of the JSON file `info` that CelebV-HQ and CelebV-Text have in common."""
    root = require_folder(source, info, folder)
    clips = read_json(root / info).get("clips")
    if not isinstance(clips, dict) or not all(
        isinstance(clip, dict) and "ytb_id" in clip for clip in clips.values()
    ):
        raise UserError(f'{root / info}: expected {{"clips": {{CLIP: {{"ytb_id": ...}}}}}}.')
    return tuple(
        Clip(str(clip["ytb_id"]), name, f"{folder}/{name}.mp4")
        for name, clip in sorted(clips.items())
    )
