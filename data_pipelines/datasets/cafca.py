"""Cafca: 1,500 synthetic people, 13 expressions, 30 cameras (Bühler et al., SIGGRAPH Asia 2024).

    SOURCE/[00000-00099/]SUBJECT/EXPRESSION_ENVIRONMENT/color_image/C00.png
    SOURCE/[00000-00099/]SUBJECT/EXPRESSION_ENVIRONMENT/foreground_mask/C00.png
    SOURCE/[00000-00099/]SUBJECT/EXPRESSION_ENVIRONMENT/cameras_json/C00.json    K, cam2world, ...
    SOURCE/processing/SUBJECT/EXPRESSION_ENVIRONMENT/C00/...    Pixel3DMM, of one or more cameras
    SOURCE/tracking/SUBJECT/EXPRESSION_ENVIRONMENT/C00/...

A clip is a subject in one environment; its moments are the expressions. Chunk folders, as the full
data set's archives unpack to, may be there or not.

Published (https://github.com/syntec-research/Cafca): all files; OpenCV axes. Assumed: K is in
pixels of the image with a pixel's centre at a half, and the world's unit is the metre.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from etils import epath

from data_pipelines import media
from data_pipelines.captures import CaptureSet, SkippedFrame
from data_pipelines.datasets import multi_view
from data_pipelines.datasets.multi_view import MultiViewCaptures, Performance
from data_pipelines.datasets.tracked_videos import read_json, require_folder
from data_pipelines.datasets.views import Camera, TrackedFrame, View, read_matrix, resize_mask
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import list_folder
from data_pipelines.pixel3dmm import TrackedClip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    multi_view.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    source = require_folder(args.source)
    scenes = sorted(
        (subject.name, scene.name.split("_")[1], int(scene.name.split("_")[0]), str(subject))
        for folder in (source, *list_folder(source))
        if folder is source or re.fullmatch(r"\d+-\d+", folder.name)
        for subject in list_folder(folder)
        if re.fullmatch(r"\d{5}", subject.name)
        for scene in list_folder(subject)
        if re.fullmatch(r"\d{5}_\d{3}", scene.name)
    )
    if not scenes:
        raise MissingFileError(f"{source}: no SUBJECT/EXPRESSION_ENVIRONMENT folders in it.")
    performances = tuple(
        CafcaPerformance(args.source, subject, environment, folder, tuple(e for *_, e, _ in group))
        for (subject, environment, folder), group in (
            (key, list(group))
            for key, group in itertools.groupby(scenes, key=lambda s: (s[0], s[1], s[3]))
        )
    )
    return [MultiViewCaptures("cafca", performances, args.every)]


@dataclasses.dataclass(frozen=True)
class CafcaPerformance(Performance):
    """One subject in one environment.

    Attributes:
      folder: the subject's folder.
      expressions: their numbers; a timestep is one of them.
    """

    source: str
    person: str
    sequence: str
    folder: str
    expressions: tuple[int, ...]

    def camera_names(self) -> list[str]:
        return sorted(
            {
                path.stem
                for expression in self.expressions
                for path in list_folder(self._scene(expression) / "cameras_json")
                if path.suffix == ".json"
            }
        )

    def camera(self, name: str, timestep: int) -> Camera:
        path = self._scene(timestep) / "cameras_json" / f"{name}.json"
        if not path.exists():
            raise MissingFileError(f"{path}: no such file.")
        fields = read_json(path)
        return Camera(
            read_matrix(fields.get("K"), (3, 3), f"{path}: K"),
            read_matrix(fields.get("cam2world"), (4, 4), f"{path}: cam2world"),
        )

    def views(self, name: str, timesteps: Sequence[int]) -> Iterator[View | SkippedFrame]:
        for timestep in timesteps:
            scene = self._scene(timestep)
            try:
                photo = media.read_image(scene / "color_image" / f"{name}.png")
                mask = media.read_image(scene / "foreground_mask" / f"{name}.png", "L")
            except MissingFileError:
                yield SkippedFrame("its color_image or foreground_mask is missing")
                continue
            except UserError as error:
                yield SkippedFrame(str(error))
                continue
            yield View(timestep, photo, resize_mask(mask, photo))

    def tracked(self, name: str) -> dict[int, TrackedFrame]:
        frames = {}
        for expression in self.expressions:
            scene = self._scene(expression).name
            try:
                clip = TrackedClip(self.source, f"{self.person}/{scene}/{name}")
            except MissingFileError:
                continue
            frames[expression] = TrackedFrame(clip, clip.timesteps[0])
        return frames

    def _scene(self, expression: int) -> epath.Path:
        return epath.Path(self.folder) / f"{expression:05d}_{self.sequence}"
