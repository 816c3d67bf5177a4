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
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from data_pipelines import pixel3dmm
from data_pipelines.captures import CaptureSet, SkippedFrame
from data_pipelines.datasets import multi_view
from data_pipelines.datasets.multi_view import (
    Camera,
    MultiViewCaptures,
    Performance,
    View,
    read_matrix,
)
from data_pipelines.datasets.tracked_videos import read_json, require_folder

CALIBRATED_WIDTH = 2668
"""Pixels a row of the photos for which the published K holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    multi_view.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    source = require_folder(args.source)
    captures = sorted(path.parent.parent for path in source.glob("*/decoder/frame_list.csv"))
    if not captures:
        raise FileNotFoundError(f"{source}: no CAPTURE/decoder/frame_list.csv in it.")
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
        return list(self._cameras)

    def camera(self, name: str, timestep: int) -> Camera:
        return self._cameras[name]

    def views(self, name: str, timesteps: Sequence[int]) -> Iterator[View | SkippedFrame]:
        members = [f"cam{name}/{self.frames[timestep]:06d}" for timestep in timesteps]
        zip_path = self._images / f"cam{name}.zip"
        photos = _read_zip(zip_path, [f"{member}.avif" for member in members])
        parts_path = self._decoder / "segmentation_parts" / f"cam{name}.zip"
        regions = _read_zip(parts_path, [f"{member}.png" for member in members])
        rows = zip(timesteps, members, photos, regions, strict=True)
        for timestep, member, photo, region in rows:
            if photo is None:
                yield SkippedFrame("its image is not in its camera's zip")
            elif region is None:
                yield SkippedFrame("its segmentation is not in segmentation_parts/")
            else:
                try:
                    image = pixel3dmm.decode_image(photo, f"{zip_path}/{member}.avif")
                    parts = pixel3dmm.decode_image(region, f"{parts_path}/{member}.png", "L")
                except ValueError as error:
                    yield SkippedFrame(str(error))
                    continue
                mask = np.where(parts > 0, np.uint8(255), np.uint8(0))
                yield View(timestep, image, multi_view.resize_mask(mask, image))

    @property
    def _decoder(self) -> epath.Path:
        return epath.Path(self.source) / self.capture / "decoder"

    @property
    def _images(self) -> epath.Path:
        return self._decoder / "image"

    @functools.cached_property
    def _cameras(self) -> dict[str, Camera]:
        recorded = {path.stem.removeprefix("cam") for path in self._images.glob("cam*.zip")}
        names = sorted(recorded & self._calibration.keys())
        width = _first_photo(self._images / f"cam{names[0]}.zip").shape[1] if names else 0
        cameras = {}
        for name in names:
            K, world2cam = self._calibration[name]
            K = K.copy()
            K[:2, 2] += 0.5  # a pixel's centre at a half
            K[:2] *= width / CALIBRATED_WIDTH
            cam2world = np.linalg.inv(world2cam)
            cam2world[:3, 3] /= 1000  # millimetres
            cameras[name] = Camera(K, cam2world)
        return cameras

    @functools.cached_property
    def _calibration(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        path = self._decoder / "camera_calibration.json"
        entries = read_json(path).get("KRT")
        if not isinstance(entries, list):
            raise ValueError(f'{path}: expected {{"KRT": [...]}}.')
        calibration = {}
        for entry in entries:
            camera = entry.get("cameraId")
            K = read_matrix(entry.get("K"), (3, 3), f"{path}: K of camera {camera}")
            T = read_matrix(entry.get("T"), (4, 4), f"{path}: T of camera {camera}")
            if np.any(T[:3, 3]):
                raise ValueError(f"{path}: T of camera {camera} is not transposed as published.")
            calibration[str(camera)] = (K.T, T.T)
        return calibration


def _segments(path: epath.Path) -> dict[str, tuple[int, ...]]:
    """Frame ids of each segment of a capture, in the file's order."""
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    segments: dict[str, list[int]] = {}
    try:
        for row in rows:
            segments.setdefault(row["seg_id"], []).append(int(row["frame_id"]))
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path}: expected columns seg_id and frame_id, a whole number.") from None
    return {segment: tuple(frames) for segment, frames in segments.items()}


def _read_zip(path: epath.Path, members: Sequence[str]) -> Iterator[bytes | None]:
    """Files of a zip one by one; None for those that are not in it, or if there is no zip."""
    if not path.exists():
        yield from (None for _ in members)
        return
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            known = set(archive.namelist())
            for member in members:
                yield archive.read(member) if member in known else None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a whole zip ({error}); download it again.") from None


def _first_photo(path: epath.Path) -> np.ndarray:
    """Any one of a camera's images."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                if member.endswith(".avif"):
                    return pixel3dmm.decode_image(archive.read(member), f"{path}/{member}")
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a whole zip ({error}); download it again.") from None
    raise ValueError(f"{path}: no .avif images in it.")
