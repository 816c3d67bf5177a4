"""What drives an avatar: tracked frames, a clip of a prepared set, another avatar's performance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.index import is_finished
from data_pipelines.pixel3dmm import read_driving
from data_pipelines.shards import PreparedSet
from flexavatar_jax.avatars.avatar_file import SUFFIX, load_avatar
from flexavatar_jax.avatars.observations import find_tracked, most_frontal, people_of


class Performance(NamedTuple):
    """The tracked frames of a performance.

    Attributes:
      expressions: [T, 135] codes.
      cam2heads: [T, 4, 4] cameras in the canonical head frame.
      pictures: yields the T frames as pictures, square, RGB, uint8; None where there are none.
    """

    expressions: Float[np.ndarray, "T 135"]
    cam2heads: Float[np.ndarray, "T 4 4"]
    pictures: Callable[[], Iterator[UInt8[np.ndarray, "H H 3"]]] | None


def read_performance(source: str) -> Performance:
    """Reads what drives an avatar.

    Args:
      source: a folder of the tracker's .frame files; a tracked video DIR/inputs/NAME.mp4 or folder
        of pictures; SET/PERSON of a prepared data set (as the camera of the most frontal first
        frame saw them); or an .avatar file, made of a video or of a prepared person.

    Raises:
      UserError: no such performance, or a damaged one.
    """
    path = Path(source)
    if path.suffix == SUFFIX:
        avatar = load_avatar(path)
        return Performance(avatar.expressions, avatar.cam2heads, None)
    if is_finished(path.parent):
        return _prepared(path.parent, path.name)
    if path.parent.name == "inputs":
        tracked = find_tracked(source)
        frames = [(p.expression, p.cam2head) for p in tracked.read()]
        pictures = lambda: (p.image for p in tracked.read())  # noqa: E731
        return Performance(*map(np.stack, zip(*frames, strict=True)), pictures)
    driving = read_driving(source)
    return Performance(driving.expression, driving.cam2head, None)


def _prepared(folder: Path, name: str) -> Performance:
    people_of(folder, [name])
    data = PreparedSet(folder)
    index = data.index
    clip = list(map(str, index.person)).index(name)
    records = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
    first = records[index.timestep[records] == index.timestep[records].min()]
    frames = [data.frame(int(i)) for i in first]
    front = first[most_frontal(frames, index.timestep[first])]
    chosen = records[index.camera[records] == index.camera[front]]
    chosen = chosen[np.argsort(index.timestep[chosen], kind="stable")]
    frames = [data.frame(int(i)) for i in chosen]
    return Performance(
        np.stack([f.expression for f in frames]),
        np.stack([f.cam2head for f in frames]),
        lambda: (data.frame(int(i)).image for i in chosen),
    )


def follow_pose(
    cam2head: Float[np.ndarray, "4 4"], driver: Float[np.ndarray, "T 4 4"]
) -> Float[np.ndarray, "T 4 4"]:
    """Views in which a head moves before the camera as the driver's head did before its own.

    The head turns about its own origin by as much as the driver's turned since the first frame,
    and moves as far, in proportion to the distance from the camera.

    Args:
      cam2head: the avatar's view to begin with.
      driver: the driver's cameras in the canonical head frame.
    """
    own, driver = cameras.invert_rigid(cam2head), cameras.invert_rigid(np.asarray(driver))
    R = driver[:, :3, :3] @ driver[0, :3, :3].T @ own[:3, :3]
    near = np.linalg.norm(own[:3, 3]) / max(np.linalg.norm(driver[0, :3, 3]), 1e-9)
    t = own[:3, 3] + near * (driver[:, :3, 3] - driver[0, :3, 3])
    return cameras.invert_rigid(cameras.rigid(cameras.nearest_rotation(R), t))


def check_pictures(performance: Performance, source: str) -> None:
    """Raises `UserError` for a performance that cannot be shown beside the avatar."""
    if performance.pictures is None:
        raise UserError(
            f"--beside: {source} holds no pictures; drive with a tracked video (DIR/inputs/"
            "NAME.mp4) or a prepared SET/PERSON, or leave the option out"
        )
