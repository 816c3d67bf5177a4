"""NeRSemble v2: facial performances seen by 16 cameras (Kirschstein et al., SIGGRAPH 2023).

    SOURCE/037/calibration/camera_params.json      {"world_2_cam": {SERIAL: 4x4}, "intrinsics": 3x3}
    SOURCE/037/calibration/color_calibration.json  {SERIAL: colour correction matrix}
    SOURCE/037/sequences/SEQUENCE/images/cam_SERIAL.mp4
    SOURCE/masks/037/SEQUENCE/SERIAL/00000.png     mattes of the videos' frames, if you have them
    SOURCE/processing/037/SEQUENCE/SERIAL/...      Pixel3DMM, of one or more cameras
    SOURCE/tracking/037/SEQUENCE/SERIAL/...

The data set has no mattes. Make them with a video matting network; without, only the cameras that
were tracked are used, with the tracker's segmentation as mask.

Published (https://github.com/tobias-kirschstein/nersemble-data): all but the last three folders;
poses are world-to-camera with OpenCV axes; one K for all cameras, at 2200x3208; the correction is a
polynomial in linear sRGB. Assumed: the world's unit is the metre, and frame t of a tracking is
frame t of the video.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, ImageFilter

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

CALIBRATED_WIDTH = 2200
"""Pixels a row of the photos for which the published K holds."""

_POLYNOMIALS = {
    3: "r g b",
    4: "r g b 1",
    5: "r g b rgb 1",
    7: "r g b rg rb gb 1",
    8: "r g b rg rb gb rgb 1",
    10: "r g b rg rb gb rr gg bb 1",
    11: "r g b rg rb gb rr gg bb rgb 1",
    14: "r g b rg rb gb rr gg bb rgb rrr ggg bbb 1",
}
"""Terms of a colour correction by the number of a matrix's columns (Cheung et al. 2004)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    multi_view.add_arguments(parser)


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    source = require_folder(args.source)
    performances = tuple(
        NersemblePerformance(args.source, folder.parent.parent.name, folder.name)
        for participant in list_folder(source)
        if re.fullmatch(r"\d{3}", participant.name)
        for folder in list_folder(participant / "sequences")
        if folder.name != "BACKGROUND"
    )
    if not performances:
        raise MissingFileError(f"{source}: no NNN/sequences/ in it; is it the NeRSemble folder?")
    return [MultiViewCaptures("nersemble", performances, args.every)]


@dataclasses.dataclass(frozen=True)
class NersemblePerformance(Performance):
    """One sequence of one participant."""

    source: str
    person: str
    sequence: str

    def camera_names(self) -> list[str]:
        _ = self._K  # all cameras share it: without, there is none
        return self._names

    def camera(self, name: str, timestep: int) -> Camera:
        where = f"{self._camera_params}: world_2_cam of {name}"
        return Camera(self._K, invert_pose(read_matrix(self._poses[name], (4, 4), where), where))

    def views(self, name: str, timesteps: Sequence[int]) -> Iterator[View | SkippedFrame]:
        corrected = colour_correction(self._colour(name))
        masks = epath.Path(self.source) / "masks" / self.person / self.sequence / name
        wanted = set(timesteps)
        for timestep, photo in media.read_video(self._video(name)):
            if timestep not in wanted:
                continue
            wanted.discard(timestep)
            mask = None
            if (masks / f"{timestep:05d}.png").exists():
                try:
                    mask = media.read_image(masks / f"{timestep:05d}.png", "L")
                except UserError as error:
                    yield SkippedFrame(str(error))
                    continue
                mask = resize_mask(mask, photo)
            yield View(timestep, np.asarray(Image.fromarray(photo).filter(corrected)), mask)
        for _ in wanted:
            yield SkippedFrame("its video ends before the tracking")

    @property
    def _videos(self) -> epath.Path:
        return epath.Path(self.source) / self.person / "sequences" / self.sequence / "images"

    def _video(self, name: str) -> epath.Path:
        return self._videos / f"cam_{name}.mp4"

    @property
    def _names(self) -> list[str]:
        recorded = {
            path.stem.removeprefix("cam_")
            for path in list_folder(self._videos)
            if path.name.startswith("cam_") and path.suffix == ".mp4"
        }
        return sorted(recorded & self._poses.keys())

    @property
    def _camera_params(self) -> epath.Path:
        return epath.Path(self.source) / self.person / "calibration" / "camera_params.json"

    @functools.cached_property
    def _calibration(self) -> dict:
        return read_json(self._camera_params)

    @property
    def _poses(self) -> dict[str, object]:
        poses = self._calibration.get("world_2_cam")
        if not isinstance(poses, dict):
            raise UserError(
                f"{self._camera_params}: expected world_2_cam, a 4x4 matrix of each camera."
            )
        return poses

    @functools.cached_property
    def _K(self) -> np.ndarray:
        """Intrinsics at the videos' size: all cameras are alike, so of any video that decodes."""
        where = f"{self._camera_params}: intrinsics"
        K = read_matrix(self._calibration.get("intrinsics"), (3, 3), where)
        width, _ = first_readable(media.video_size, map(self._video, self._names))
        K[:2] *= width / CALIBRATED_WIDTH
        return K

    def _colour(self, name: str) -> np.ndarray:
        path = epath.Path(self.source) / self.person / "calibration" / "color_calibration.json"
        rows = read_json(path).get(name)
        terms = len(rows[0]) if isinstance(rows, list) and rows and isinstance(rows[0], list) else 0
        if terms not in _POLYNOMIALS:
            raise UserError(
                f"{path}: camera {name} has no colour correction of 3 rows and "
                f"{', '.join(map(str, _POLYNOMIALS))} columns."
            )
        return read_matrix(rows, (3, terms), f"{path}: camera {name}")


def colour_correction(matrix: Float[np.ndarray, "3 terms"]) -> ImageFilter.Color3DLUT:
    """A Pillow filter that applies a colour correction matrix to an sRGB picture.

    The matrix multiplies a polynomial's terms in linear light, `_POLYNOMIALS`. Done once for a
    grid of colours and interpolated between, as a picture has millions.
    """
    nodes = 65
    levels = np.linspace(0, 1, nodes)
    # Red varies fastest in Pillow's tables.
    b, g, r = (_linear(c) for c in np.meshgrid(levels, levels, levels, indexing="ij"))
    factors = {"r": r, "g": g, "b": b, "1": np.ones_like(r)}
    terms = [
        np.prod([factors[factor] for factor in term], axis=0)
        for term in _POLYNOMIALS[matrix.shape[1]].split()
    ]
    table = _srgb(np.einsum("ct,tzyx->zyxc", matrix, np.stack(terms)))
    return ImageFilter.Color3DLUT(nodes, table.ravel())


def _linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB's transfer function (IEC 61966-2-1) undone; both in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _srgb(linear: np.ndarray) -> np.ndarray:
    """sRGB's transfer function, of values clipped to [0, 1]."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
