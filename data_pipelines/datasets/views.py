"""A calibrated camera, what it saw, what the tracker made of it, and how calibrations are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.pixel3dmm import TrackedClip
from data_pipelines.tracking import Tracking

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Camera:
    """A calibrated camera.

    Attributes:
      K: [3, 3] intrinsics in pixels of its photos, a pixel's centre at a half.
      cam2world: [4, 4] metres, OpenCV axes.
    """

    K: Float[np.ndarray, "3 3"]
    cam2world: Float[np.ndarray, "4 4"]

    def __post_init__(self) -> None:
        if not (self.K[0, 0] > 0 and self.K[1, 1] > 0 and np.linalg.det(self.K) > 0):
            raise UserError("a camera's K has no positive focal lengths; correct its calibration")


class View(NamedTuple):
    """A photo: [H, W, 3] uint8, and its foreground [H, W] uint8 where the data set knows it."""

    timestep: int
    photo: UInt8[np.ndarray, "H W 3"]
    mask: UInt8[np.ndarray, "H W"] | None


class TrackedFrame(NamedTuple):
    """A frame of a tracked clip."""

    clip: TrackedClip
    index: int

    def tracking(self) -> Tracking:
        """Raises `UserError`."""
        return self.clip.tracking(self.index)


def resize_mask(
    mask: UInt8[np.ndarray, "h w"], photo: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "H W"]:
    """A mask of a photo, stored at another resolution, at the photo's."""
    height, width = photo.shape[:2]
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))


def first_readable(read: Callable[[epath.Path], _T], paths: Iterable[epath.Path]) -> _T:
    """What `read` makes of the first of `paths` that is whole.

    Raises the `UserError` of the last one if none is.
    """
    fault = UserError("none of its cameras has a file")
    for path in paths:
        try:
            return read(path)
        except UserError as error:
            fault = error
    raise fault


def read_matrix(
    value: object, shape: tuple[int, int], where: str
) -> Float[np.ndarray, "rows columns"]:
    """A matrix from JSON; raises a `UserError` that begins with `where` if it is none."""
    try:
        matrix = np.array(value, np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != shape or not np.isfinite(matrix).all():
        raise UserError(f"{where}: expected {shape[0]}x{shape[1]} numbers.")
    return matrix


def invert_pose(pose: Float[np.ndarray, "4 4"], where: str) -> Float[np.ndarray, "4 4"]:
    """The inverse of a camera's pose from a file; raises a `UserError` that begins with `where`."""
    if not 0.1 < abs(np.linalg.det(pose[:3, :3])) < 10 or np.any(pose[3] != [0, 0, 0, 1]):
        raise UserError(f"{where}: expected a rotation, a translation and the row 0 0 0 1.")
    return np.linalg.inv(pose)
