"""What multi-view data sets have in common: calibrated cameras round a head that was tracked.

Cameras come from the data set's calibration; where the head is, and its expression, from Pixel3DMM
run on one or more of the cameras, each as a clip of its own:

    SOURCE/processing/PERSON/SEQUENCE/CAMERA/...    crop and segmentation
    SOURCE/tracking/PERSON/SEQUENCE/CAMERA/...      FLAME and camera of every frame

Where the head is then is told in `heads`. The expression code is the one of the tracked camera that
sees the face most from the front.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.datasets.heads import cut_head, head_pose
from data_pipelines.datasets.views import Camera, TrackedFrame, View
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.frame import MULTI_VIEW, Frame
from data_pipelines.pixel3dmm import TrackedClip


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
        cut = cut_head(camera, head2world, view, tracked)
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


def add_arguments(parser: argparse.ArgumentParser, every: int = 1) -> None:
    """Options that all multi-view data sets have."""
    parser.add_argument("--source", required=True, help="folder of the data set")
    parser.add_argument(
        "--every", type=int, default=every, help="take every N-th moment (default: %(default)s)"
    )


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
