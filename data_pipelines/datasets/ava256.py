"""Ava-256: 256 people in a dome of some 80 cameras (Martinez et al., NeurIPS 2024 data sets).

    SOURCE/CAPTURE/decoder/camera_calibration.json             {"KRT": [{"cameraId", "K", "T"}]}
    SOURCE/CAPTURE/decoder/frame_list.csv                      seg_id,frame_id
    SOURCE/CAPTURE/decoder/image/camCAMERA.zip                 of camCAMERA/000123.avif
    SOURCE/CAPTURE/decoder/segmentation_parts/camCAMERA.zip    of camCAMERA/000123.png
    SOURCE/processing/PERSON/SEGMENT/CAMERA/...                Pixel3DMM, of one or more cameras
    SOURCE/tracking/PERSON/SEGMENT/CAMERA/...

A clip is a segment of a capture, its moments the segment's frames in the order of frame_list.csv;
to track a camera, run Pixel3DMM on the folder of those frames' pictures. CAPTURE is a folder such
as 20230831--0814--ADL311, whose last part names the person.

Published (https://github.com/facebookresearch/ava-256): all files; K and T are stored transposed, T
world-to-camera with OpenCV axes in millimetres; K is for 4096x2668, pixel centres at whole numbers,
and images are a quarter of that. Assumed: region 0 of a segmentation is the background, and the
smaller releases keep names and aspect.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from etils import epath

from data_pipelines import media
from data_pipelines.captures import CaptureSet, SkippedFrame
from data_pipelines.datasets import multi_view
from data_pipelines.datasets.multi_view import MultiViewCaptures, Performance
from data_pipelines.datasets.tracked_videos import read_json, require_folder
from data_pipelines.datasets.views import (
    Camera,
    View,
    first_readable,
    invert_pose,
    read_matrix,
    resize_mask,
)
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import list_folder

CALIBRATED_WIDTH = 2668
"""Pixels a row of the photos for which the published K holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    multi_view.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    source = require_folder(args.source)
    captures = [
        path for path in list_folder(source) if (path / "decoder" / "frame_list.csv").exists()
    ]
    if not captures:
        raise MissingFileError(f"{source}: no CAPTURE/decoder/frame_list.csv in it.")
    performances = tuple(
        Ava256Performance(args.source, capture.name.split("--")[-1], segment, capture.name, frames)
        for capture in captures
        for segment, frames in _segments(capture / "decoder" / "frame_list.csv").items()
    )
    return [MultiViewCaptures("ava256", performances, args.every)]


@dataclasses.dataclass(frozen=True)
class Ava256Performance(Performance):
    """One segment of one capture.

    Attributes:
      capture: name of the capture's folder.
      frames: the segment's frame ids; a timestep is a position in it.
    """

    source: str
    person: str
    sequence: str
    capture: str
    frames: tuple[int, ...]

    def camera_names(self) -> list[str]:
        _ = self._width  # all cameras share it: without, there is none
        return self._names

    def camera(self, name: str, timestep: int) -> Camera:
        path, entry = self._decoder / "camera_calibration.json", self._calibration[name]
        K = read_matrix(entry.get("K"), (3, 3), f"{path}: K of camera {name}").T.copy()
        T = read_matrix(entry.get("T"), (4, 4), f"{path}: T of camera {name}")
        if np.any(T[:3, 3]):
            raise UserError(f"{path}: T of camera {name} is not transposed as published.")
        K[:2, 2] += 0.5  # a pixel's centre at a half
        K[:2] *= self._width / CALIBRATED_WIDTH
        cam2world = invert_pose(T.T, f"{path}: T of camera {name}")
        cam2world[:3, 3] /= 1000  # millimetres
        return Camera(K, cam2world)

    def views(self, name: str, timesteps: Sequence[int]) -> Iterator[View | SkippedFrame]:
        members = [f"cam{name}/{self.frames[timestep]:06d}" for timestep in timesteps]
        zip_path = self._images / f"cam{name}.zip"
        parts_path = self._decoder / "segmentation_parts" / f"cam{name}.zip"
        photos = _read_zip(
            zip_path,
            [f"{member}.avif" for member in members],
            "its image is not in its camera's zip",
        )
        regions = _read_zip(
            parts_path,
            [f"{member}.png" for member in members],
            "its segmentation is not in segmentation_parts/",
        )
        for timestep, member, photo, region in zip(
            timesteps, members, photos, regions, strict=True
        ):
            bad = next((x for x in (photo, region) if isinstance(x, SkippedFrame)), None)
            if bad is not None:
                yield bad
                continue
            try:
                image = media.decode_image(photo, f"{zip_path}/{member}.avif")
                parts = media.decode_classes(region, f"{parts_path}/{member}.png")
            except UserError as error:
                yield SkippedFrame(str(error))
                continue
            mask = np.where(parts > 0, np.uint8(255), np.uint8(0))
            yield View(timestep, image, resize_mask(mask, image))

    @property
    def _decoder(self) -> epath.Path:
        return epath.Path(self.source) / self.capture / "decoder"

    @property
    def _images(self) -> epath.Path:
        return self._decoder / "image"

    @property
    def _names(self) -> list[str]:
        recorded = {
            path.stem.removeprefix("cam")
            for path in list_folder(self._images)
            if path.name.startswith("cam") and path.suffix == ".zip"
        }
        return sorted(recorded & self._calibration.keys())

    @functools.cached_property
    def _width(self) -> int:
        """Of the images: all cameras are alike, so of any whose zip is whole."""
        zips = (self._images / f"cam{name}.zip" for name in self._names)
        return first_readable(_first_photo, zips).shape[1]

    @functools.cached_property
    def _calibration(self) -> dict[str, dict]:
        path = self._decoder / "camera_calibration.json"
        entries = read_json(path).get("KRT")
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UserError(f'{path}: expected {{"KRT": [{{"cameraId", "K", "T"}}]}}.')
        return {str(entry.get("cameraId")): entry for entry in entries}


def _segments(path: epath.Path) -> dict[str, tuple[int, ...]]:
    """Frame ids of each segment of a capture, in the file's order."""
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    segments: dict[str, list[int]] = {}
    try:
        for row in rows:
            segments.setdefault(row["seg_id"], []).append(int(row["frame_id"]))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: expected columns seg_id and frame_id, a whole number.") from None
    return {segment: tuple(frames) for segment, frames in segments.items()}


_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError)
"""How damaged zips show."""


def _read_zip(
    path: epath.Path, members: Sequence[str], missing: str
) -> Iterator[bytes | SkippedFrame]:
    """Files of a zip one by one, or why a frame goes without: `missing` if there is none.

    Raises `ValueError` if the zip is damaged as a whole.
    """
    if not path.exists():
        yield from (SkippedFrame(missing) for _ in members)
        return
    with path.open("rb") as file, _open_zip(file, path) as archive:
        known = set(archive.namelist())
        for member in members:
            if member not in known:
                yield SkippedFrame(missing)
                continue
            try:
                content = archive.read(member)
            except _DAMAGE as error:
                yield SkippedFrame(f"{path}/{member} is damaged ({error}); download it again.")
            else:
                yield content


def _first_photo(path: epath.Path) -> np.ndarray:
    """Any one of a camera's images; raises `ValueError` if none can be read."""
    with path.open("rb") as file, _open_zip(file, path) as archive:
        for member in archive.namelist():
            if member.endswith(".avif"):
                try:
                    return media.decode_image(archive.read(member), f"{path}/{member}")
                except (*_DAMAGE, UserError):
                    continue
    raise UserError(f"{path}: no .avif image in it that can be read.")


def _open_zip(file: BinaryIO, path: epath.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise UserError(f"{path}: not a whole zip ({error}); download it again.") from None
