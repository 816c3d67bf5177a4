"""Who is evaluated: test people, the frames to be predicted, and the sectors they are seen from."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.frame import Frame
from data_pipelines.shards import PreparedSet

SECTORS = ("front", "side", "back")


class Person(NamedTuple):
    """A test person: the only input, and the frames to be predicted.

    Of whom there is one frame only, it is both, and `shows_input`.
    """

    name: str
    input: Frame
    targets: list[Frame]
    shows_input: bool = False


def azimuth(cam2head: Float[np.ndarray, "4 4"]) -> float:
    """Degrees by which the camera stands off the face's axis, to either side: 0 front, 180 back."""
    x, _, z = cam2head[:3, 3]
    return float(np.degrees(np.abs(np.arctan2(x, z))))


def sector(cam2head: Float[np.ndarray, "4 4"]) -> str:
    """front below 60 degrees of azimuth, back from 120 on, side between."""
    angle = azimuth(cam2head)
    return "front" if angle < 60 else "side" if angle < 120 else "back"


def on_white(frame: Frame) -> Float[np.ndarray, "H W 3"]:
    """A frame's foreground on white, RGB in [0, 1]."""
    alpha = frame.mask[..., None].astype(np.float32) / 255
    return frame.image.astype(np.float32) / 255 * alpha + (1 - alpha)


def portrait(person: Person, config: ConfigDict) -> Frame:
    """The input as it is tracked where there is nothing but this picture: what is encoded.

    A test set's cameras are calibrated. A portrait's is not: how large a head is, and how far the
    camera, one picture doesn't tell. `config.eval.portrait_size` says how large trackers take heads
    to be in terms of what they are; pictures and focal length stay.
    """
    size = config.eval.get("portrait_size", 1.0)  # runs of before have none
    cam2head = person.input.cam2head.copy()
    cam2head[:3, 3] *= size
    return dataclasses.replace(person.input, cam2head=cam2head)


def read_people(data: PreparedSet, people: int, images: int, size: int) -> list[Person]:
    """The first `people` of a test set, `images` targets each, spread over cameras and time.

    Raises:
      UserError: a damaged set, or one with a single frame of somebody and several of others.
    """
    names = list(first_clips(data))[:people]
    bar = tqdm(names, desc="reading test people", unit="person")
    result = [read_person(data, name, images, size) for name in bar]
    alone = [person.name for person in result if person.shows_input]
    if 0 < len(alone) < len(result):
        raise UserError(
            f"{data.folder} has one frame only of {alone[0]} ({len(alone)} of {len(result)} "
            "people), which leaves none to predict; prepare those with one frame as a set of "
            "their own, or leave them out"
        )
    return result


def first_clips(data: PreparedSet) -> dict[str, int]:
    """Each person of a set, in the set's order, with the number of their first clip."""
    clips: dict[str, int] = {}
    for clip, name in enumerate(data.index.person):
        clips.setdefault(str(name), clip)
    return clips


def read_person(data: PreparedSet, name: str, images: int, size: int) -> Person:
    """One person: of their first clip the most frontal first frame, and at most `images` others.

    Raises:
      UserError: a damaged set, or no image left to predict.
    """
    index, clip = data.index, first_clips(data)[name]
    records = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
    first = records[index.timestep[records] == index.timestep[records].min()]
    source = min(
        (data.frame(int(i), size) for i in first), key=lambda frame: azimuth(frame.cam2head)
    )
    chosen = records[spread(index.camera[records], index.timestep[records], images)]
    targets = [data.frame(int(i), size) for i in chosen]
    targets = [t for t in targets if (t.camera, t.timestep) != (source.camera, source.timestep)]
    alone = len(records) == 1
    if not (targets or alone):
        raise UserError(
            f"config.eval.images_per_person is {images}, and that is the input of {name}; "
            "evaluate with 2 or more"
        )
    return Person(name, source, [source] if alone else targets, alone)


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def spread(camera: np.ndarray, timestep: np.ndarray, wanted: int) -> np.ndarray:
    """At most `wanted` of a clip's frames, evenly spaced over cameras and, in each, over time.

    All cameras come where there are as many wanted. In the order frames are stored, moment by
    moment, a stride would meet some cameras again and again and others never.
    """
    camera_by_camera = np.lexsort((timestep, camera))
    return camera_by_camera[evenly_spaced(len(camera), wanted)]


CLIP_FRAMES = 24
"""Moments of a person's clip that are looked at."""


def read_clip(data: PreparedSet, person: Person, size: int) -> list[Frame]:
    """The clip that the input was taken from: other moments before the same camera, in order."""
    index = data.index
    clip = np.flatnonzero(index.person == person.name)[0]
    records = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
    records = records[index.camera_names[index.camera[records]] == person.input.camera]
    records = records[np.argsort(index.timestep[records])]
    chosen = records[evenly_spaced(len(records), CLIP_FRAMES + 1)]
    frames = [data.frame(int(i), size) for i in chosen]
    return [frame for frame in frames if frame.timestep != person.input.timestep]
