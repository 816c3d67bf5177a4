"""What monocular data sets have in common: clips of one camera, each tracked with Pixel3DMM.

Beside the data set's own files, the source folder holds the tracker's, whose NAME is the clip's:

    SOURCE/processing/NAME/...    crop and segmentation
    SOURCE/tracking/NAME/...      FLAME and camera of every frame

as `data_pipelines.pixel3dmm` describes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator

import numpy as np
from etils import epath

from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.frame import MONOCULAR, Frame
from data_pipelines.media import PICTURES, VIDEOS, read_photos
from data_pipelines.pixel3dmm import Portrait, TrackedClip


@dataclasses.dataclass(frozen=True)
class Clip:
    """A picture, a video or a folder of pictures that shows one person.

    Attributes:
      person: whose face it is, as far as the data set knows.
      name: of the clip, unique in the data set; also its name in the tracker's folders.
      path: of the picture, video or folder, below the source folder.
    """

    person: str
    name: str
    path: str


@dataclasses.dataclass(frozen=True)
class TrackedVideos:
    """Tracked clips as a `CaptureSet`.

    Attributes:
      name: of the prepared data set.
      source: the data set's folder.
      clips: all clips, tracked or not; those that are not are left out.
      every: every how many frames one is taken.
    """

    name: str
    source: str
    clips: tuple[Clip, ...]
    every: int = 1

    @property
    def num_clips(self) -> int:
        return len(self.clips)

    def clip_name(self, i: int) -> str:
        return self.clips[i].name

    def clip(self, i: int) -> Iterator[Frame | SkippedFrame]:
        """Every `every`-th tracked frame of clip `i`; raises `SkipClip`."""
        clip = self.clips[i]
        path = epath.Path(self.source) / clip.path
        if not path.exists():
            raise SkipClip("its video or picture is missing")
        if not path.is_dir() and path.suffix.lower() not in PICTURES + VIDEOS:
            raise SkipClip(
                f"{path.name} is neither a picture nor a video of a kind that is read "
                f"({', '.join(PICTURES + VIDEOS)}); convert it"
            )
        try:
            tracked = TrackedClip(self.source, clip.name)
        except MissingFileError:
            raise SkipClip("it has no Pixel3DMM tracking in processing/ and tracking/") from None
        except UserError as error:
            raise SkipClip(str(error)) from None
        wanted = set(self.timesteps(tracked))
        try:
            for timestep, photo in read_photos(path):
                if timestep in wanted:
                    wanted.discard(timestep)
                    yield self._frame(clip, tracked, timestep, photo)
        except UserError as error:
            raise SkipClip(str(error)) from None
        if wanted:
            raise SkipClip(f"{path} ends before its tracking, so it is not what was tracked")

    def timesteps(self, tracked: TrackedClip) -> list[int]:
        """Frames to take of a clip."""
        return tracked.timesteps[:: self.every]

    def portrait(self, tracked: TrackedClip, timestep: int, photo: np.ndarray) -> Portrait:
        """The part of the photo to take, with what belongs to it."""
        return tracked.portrait(timestep, photo)

    def _frame(
        self, clip: Clip, tracked: TrackedClip, timestep: int, photo: np.ndarray
    ) -> Frame | SkippedFrame:
        try:
            portrait = self.portrait(tracked, timestep, photo)
        except MissingFileError:
            return SkippedFrame("its mask, seg_og/, is missing")
        except UserError as error:
            return SkippedFrame(str(error))
        return Frame(
            **{field.name: getattr(portrait, field.name) for field in dataclasses.fields(portrait)},
            person=clip.person,
            sequence=clip.name,
            timestep=timestep,
            camera="0",
            source=MONOCULAR,
        )


def add_arguments(parser: argparse.ArgumentParser, every: int = 1) -> None:
    """Options that all data sets of tracked videos have."""
    parser.add_argument("--source", required=True, help="folder of the data set")
    parser.add_argument(
        "--every", type=int, default=every, help="take every N-th frame (default: %(default)s)"
    )


def require_folder(source: epath.PathLike, *members: str) -> epath.Path:
    """The folder `source`, if it holds `members`.

    Raises:
      UserError: a sentence that says which is missing.
    """
    source = epath.Path(source)
    for path in (source, *(source / member for member in members)):
        if not path.exists():
            raise MissingFileError(
                f"{path} does not exist; see data_pipelines/DATASETS.md for the layout expected."
            )
    return source


def read_json(path: epath.Path) -> dict:
    """A JSON object; raises a `UserError` that names the file if it is none."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object.")
    return content
