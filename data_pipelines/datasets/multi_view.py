"""What multi-view data sets have in common: calibrated cameras round a head that was tracked.

Cameras come from the data set's calibration; where the head is, and its expression, from Pixel3DMM
run on one or more of the cameras, each as a clip of its own:

    SOURCE/processing/PERSON/SEQUENCE/CAMERA/...    crop and segmentation
    SOURCE/tracking/PERSON/SEQUENCE/CAMERA/...      FLAME and camera of every frame

The tracker sees a head's direction and orientation well, its distance only by its size. With two or
more tracked cameras the head's place is where their rays meet; two that stand well apart are best.
The expression code is the one of the tracked camera that sees the face most from the front.

Every image is the square round the head that monocular clips are cropped to as well.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float, Int, UInt8
from PIL import Image

from data_pipelines import cameras
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.crop import IMAGE_SIZE, WidenedCrop
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.frame import MULTI_VIEW, Frame
from data_pipelines.pixel3dmm import LARGEST_CROP, TrackedClip
from data_pipelines.tracking import Tracking

_T = TypeVar("_T")

HEAD_EXTENT = 0.31
"""Metres at the head's distance that an image's side spans, as in the tracker's widened crops."""

DISTANCE_WEIGHT = 0.1
"""How much a tracked distance counts against a metre off a camera's ray to the head."""


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


class Performance(abc.ABC):
    """A sequence of a person, seen by several cameras at the same moments; picklable.

    Attributes:
      source: the data set's folder.
      person, sequence: names.
    """

    source: str
    person: str
    sequence: str

    @abc.abstractmethod
    def camera_names(self) -> list[str]:
        """Names of the cameras; raises `SkipClip`, `UserError`."""

    @abc.abstractmethod
    def camera(self, name: str, timestep: int) -> Camera:
        """The calibration of a camera; raises `UserError`."""

    @abc.abstractmethod
    def views(self, name: str, timesteps: Sequence[int]) -> Iterator[View | SkippedFrame]:
        """What a camera saw at `timesteps`, in this order; raises `UserError`."""

    def tracked(self, name: str) -> dict[int, TrackedFrame]:
        """Frames of a camera that were tracked, by timestep; raises `UserError`."""
        try:
            clip = TrackedClip(self.source, f"{self.person}/{self.sequence}/{name}")
        except MissingFileError:
            return {}
        return {t: TrackedFrame(clip, t) for t in clip.timesteps}


@dataclasses.dataclass(frozen=True)
class MultiViewCaptures:
    """Performances as a `CaptureSet`.

    Attributes:
      name: of the prepared data set.
      performances: all of them, tracked or not; those that are not are left out.
      every: every how many moments one is taken.
    """

    name: str
    performances: tuple[Performance, ...]
    every: int = 1

    @property
    def num_clips(self) -> int:
        return len(self.performances)

    def clip_name(self, i: int) -> str:
        return f"{self.performances[i].person}/{self.performances[i].sequence}"

    def clip(self, i: int) -> Iterator[Frame | SkippedFrame]:
        """All cameras' frames of every `every`-th tracked moment, a camera after the other."""
        try:
            yield from self._clip(self.performances[i])
        except UserError as error:
            raise SkipClip(str(error)) from None

    def _clip(self, performance: Performance) -> Iterator[Frame | SkippedFrame]:
        """What is wrong with one camera costs its own frames alone."""
        names = performance.camera_names()
        tracked, faults = {}, {}
        for name in names:
            try:
                tracked[name] = performance.tracked(name)
            except UserError as error:
                tracked[name], faults[name] = {}, str(error)
                logging.warning("%s; %s counts as not tracked", error, name)
        front = _most_frontal(tracked, list(faults.values()))
        heads, codes = {}, {}
        for timestep in sorted(tracked[front])[:: self.every]:
            try:
                codes[timestep] = tracked[front][timestep].tracking().expression
                heads[timestep] = _place_head(performance, tracked, timestep)
            except UserError as error:
                yield from [SkippedFrame(str(error))] * len(names)
        for name in names:
            seen = 0
            try:
                for view in performance.views(name, list(heads)):
                    seen += 1
                    if isinstance(view, SkippedFrame):
                        yield view
                        continue
                    frame = tracked[name].get(view.timestep)
                    head, code = heads[view.timestep], codes[view.timestep]
                    yield _frame(performance, name, view, head, code, frame or faults.get(name))
            except UserError as error:  # nothing more comes of this camera
                yield from [SkippedFrame(str(error))] * (len(heads) - seen)


def _place_head(
    performance: Performance, tracked: dict[str, dict[int, TrackedFrame]], timestep: int
) -> Float[np.ndarray, "4 4"]:
    """The head's pose by all cameras that can be used; raises `UserError` if none can."""
    seen, faults = [], []
    for name, frames in tracked.items():
        if timestep not in frames:
            continue
        try:
            camera, tracking = performance.camera(name, timestep), frames[timestep].tracking()
        except UserError as error:
            faults.append(str(error))
        else:
            seen.append((camera, tracking, frames[timestep].clip.crop))
    if not seen:
        raise UserError("; ".join(faults))
    for fault in faults:
        logging.warning("%s; the head is placed without it", fault)
    return head_pose(seen)


def _frame(
    performance: Performance,
    name: str,
    view: View,
    head2world: Float[np.ndarray, "4 4"],
    code: Float[np.ndarray, "135"],
    tracked: TrackedFrame | str | None,
) -> Frame | SkippedFrame:
    """A camera's frame; `tracked` is its tracking, or what is wrong with that."""
    try:
        camera = performance.camera(name, view.timestep)
        cut = _cut_head(camera, head2world, view, tracked)
    except UserError as error:
        return SkippedFrame(str(error))
    return Frame(
        image=cut.image,
        mask=cut.mask,
        cam2head=(cameras.invert_rigid(head2world) @ camera.cam2world).astype(np.float32),
        K=cut.K.astype(np.float32),
        expression=code,
        person=performance.person,
        sequence=performance.sequence,
        timestep=view.timestep,
        camera=name,
        source=MULTI_VIEW,
    )


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


def add_arguments(parser: argparse.ArgumentParser, every: int = 1) -> None:
    """Options that all multi-view data sets have."""
    parser.add_argument("--source", required=True, help="folder of the data set")
    parser.add_argument(
        "--every", type=int, default=every, help="take every N-th moment (default: %(default)s)"
    )


class _Cut(NamedTuple):
    image: UInt8[np.ndarray, "512 512 3"]
    mask: UInt8[np.ndarray, "512 512"]
    K: Float[np.ndarray, "3 3"]


def _cut_head(
    camera: Camera,
    head2world: Float[np.ndarray, "4 4"],
    view: View,
    tracked: TrackedFrame | str | None,
) -> _Cut:
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
    return _Cut(square.cut_image(view.photo), mask, K)


def _most_frontal(tracked: dict[str, dict[int, TrackedFrame]], faults: list[str]) -> str:
    """The tracked camera that looks at the face most from the front when it first sees it.

    Raises `SkipClip`, with `faults` and those met here, if there is none.
    """
    away, faults = {}, list(faults)
    for name, frames in tracked.items():
        for timestep in sorted(frames):
            try:
                away[name] = frames[timestep].tracking().cam2head[2, 2]
                break
            except UserError as error:
                faults.append(str(error))
    if not away:
        raise SkipClip("; ".join(faults) or "none of its cameras has a Pixel3DMM tracking")
    return min(away, key=away.get)


def _rotation_between(
    a: Float[np.ndarray, "3"], b: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3 3"]:
    """The smallest rotation that turns the direction of `a` into that of `b`."""
    axis = np.cross(a, b)
    if not np.any(axis):
        return np.eye(3)
    return cameras.axis_angle(axis, np.arctan2(np.linalg.norm(axis), a @ b))


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
