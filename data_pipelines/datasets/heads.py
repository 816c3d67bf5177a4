"""Where a head is by what trackers saw of it, and the square round it in a calibrated photo.

The tracker sees a head's direction and orientation well, its distance only by its size. With two or
more tracked cameras the head's place is where their rays meet; two that stand well apart are best.
Every image is the square round the head that monocular clips are cropped to as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import cameras
from data_pipelines.crop import IMAGE_SIZE, WidenedCrop
from data_pipelines.datasets.views import Camera, TrackedFrame, View
from data_pipelines.errors import UserError
from data_pipelines.pixel3dmm import LARGEST_CROP
from data_pipelines.tracking import Tracking

HEAD_EXTENT = 0.31
"""Metres at the head's distance that an image's side spans, as in the tracker's widened crops."""

DISTANCE_WEIGHT = 0.1
"""How much a tracked distance counts against a metre off a camera's ray to the head."""


def head_pose(
    seen: Sequence[tuple[Camera, Tracking, Int[np.ndarray, "4"]]],
) -> Float[np.ndarray, "4 4"]:
    """The head in the calibrated world from what trackers made of one or more cameras' photos.

    A tracker knows neither its camera's calibration nor that its crop lies off the centre of the
    photo. So only what the photo really shows is taken from it: the pixel of the head's origin,
    the head's orientation against the ray through it, and its size, which with the calibrated
    focal length gives a distance. The place of the head is the least-squares point of all rays
    and, with `DISTANCE_WEIGHT`, distances; the orientation is the mean.

    Args:
      seen: calibration, tracking and the tracker's crop, (ymin, ymax, xmin, xmax) in the photo.

    Returns:
      [4, 4] float64 head-to-world transform, metres.
    """
    A, b, rotations = np.zeros((3, 3)), np.zeros(3), []
    for camera, tracking, (ymin, ymax, xmin, xmax) in seen:
        head2cam = cameras.invert_rigid(tracking.cam2world) @ tracking.head2world
        origin = head2cam[:3, 3]
        u, v, _ = tracking.K @ origin / origin[2] / IMAGE_SIZE
        pixel = [xmin + u * (xmax - xmin), ymin + v * (ymax - ymin), 1.0]
        ray = np.linalg.inv(camera.K) @ pixel
        turn = _rotation_between(origin, ray)
        focal = tracking.K[1, 1] * (ymax - ymin) / IMAGE_SIZE
        distance = np.linalg.norm(origin) * camera.K[1, 1] / focal

        R, centre = camera.cam2world[:3, :3], camera.cam2world[:3, 3]
        ray = R @ ray / np.linalg.norm(ray)
        along = np.outer(ray, ray)
        weights = np.eye(3) - along + DISTANCE_WEIGHT**2 * along
        A, b = A + weights, b + weights @ (centre + distance * ray)
        rotations.append(R @ turn @ head2cam[:3, :3])
    return cameras.rigid(
        cameras.nearest_rotation(np.mean(rotations, axis=0)), np.linalg.solve(A, b)
    )


class Cut(NamedTuple):
    image: UInt8[np.ndarray, "512 512 3"]
    mask: UInt8[np.ndarray, "512 512"]
    K: Float[np.ndarray, "3 3"]


def cut_head(
    camera: Camera,
    head2world: Float[np.ndarray, "4 4"],
    view: View,
    tracked: TrackedFrame | str | None,
) -> Cut:
    """The square of `HEAD_EXTENT` round the head, its mask, and K divided by its side.

    Raises `UserError` if there is no such square or no mask.
    """
    origin = (cameras.invert_rigid(camera.cam2world) @ head2world)[:3, 3]
    height, width = view.photo.shape[:2]
    x, y, _ = camera.K @ origin / origin[2]
    if origin[2] <= 0 or not (0 <= x < width and 0 <= y < height):
        raise UserError("the head is outside the picture")
    side = round(HEAD_EXTENT * camera.K[1, 1] / origin[2])
    if not 1 <= side <= LARGEST_CROP * max(height, width):
        raise UserError(f"the head would be {side} pixels large in a photo of {width}x{height}")
    left, top = round(x - side / 2), round(y - side / 2)
    box = (top, top + side, left, left + side)
    square = WidenedCrop.to_box(box, box)
    if view.mask is not None:
        mask = square.cut_mask(view.mask)
    elif isinstance(tracked, TrackedFrame):
        segmentation = tracked.clip.mask(tracked.index)
        mask = WidenedCrop.to_box(tracked.clip.crop, box).extend_mask(segmentation)
    else:
        raise UserError(tracked or "its camera has neither mattes nor a tracking")
    if not mask.any():
        raise UserError("its mask shows nobody where the head is")
    K = np.array(camera.K, np.float64)
    K[:2, 2] -= left, top
    K[:2] /= side
    return Cut(square.cut_image(view.photo), mask, K)


def _rotation_between(
    a: Float[np.ndarray, "3"], b: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3 3"]:
    """The smallest rotation that turns the direction of `a` into that of `b`."""
    axis = np.cross(a, b)
    if not np.any(axis):
        return np.eye(3)
    return cameras.axis_angle(axis, np.arctan2(np.linalg.norm(axis), a @ b))
