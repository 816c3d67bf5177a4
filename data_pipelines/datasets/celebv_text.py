"""CelebV-Text: 70,000 video clips of faces in the wild (Yu et al., CVPR 2023).

    SOURCE/celebvtext_info.json                           {"clips": {CLIP: {"ytb_id": ..., ...}}}
    SOURCE/downloaded_celebvtext/processed/CLIP.mp4       as download_and_process.py writes them
    SOURCE/processing/CLIP/..., SOURCE/tracking/CLIP/...  Pixel3DMM

Published: the JSON file and the names of the clips (https://github.com/celebv-text/CelebV-Text).
Assumed: the script's folder, after CelebV-HQ's, of which it is a copy; and that the clips of one
YouTube video show one person.
"""

from __future__ import annotations

import argparse

from data_pipelines.captures import CaptureSet
from data_pipelines.datasets import tracked_videos
from data_pipelines.datasets.celebv_hq import downloaded_clips
from data_pipelines.datasets.tracked_videos import TrackedVideos


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tracked_videos.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    folder = "downloaded_celebvtext/processed"
    clips = downloaded_clips(args.source, "celebvtext_info.json", folder)
    return [TrackedVideos("celebv_text", args.source, clips, args.every)]
