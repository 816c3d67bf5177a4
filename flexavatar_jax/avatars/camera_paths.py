"""Camera paths round a head: an orbit, the paper's frontal circle, or one from a file."""

from __future__ import annotations

import json
import os

import numpy as np
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.errors import UserError
from flexavatar_jax.avatars.inputs import check_camera

CIRCLE_YAW, CIRCLE_PITCH = 25.0, 15.0
"""How far the frontal circle goes to the sides, and up and down, in degrees."""

MAX_PATH_BYTES = 1 << 26


def orbit_cameras(
    cam2head: Float[np.ndarray, "4 4"], frames: int
) -> Float[np.ndarray, "frames 4 4"]:
    """A camera turned once round the head's vertical axis, starting where it stands."""
    angles = np.linspace(0, 360, frames, endpoint=False)
    return np.stack([turned_camera(cam2head, angle) for angle in angles])


def circle_cameras(
    cam2head: Float[np.ndarray, "4 4"], frames: int
) -> Float[np.ndarray, "frames 4 4"]:
    """The paper's frontal circle: once round an ellipse before the face.

    The camera first goes to where it faces the head, then leaves that by `CIRCLE_YAW` degrees to
    the sides and by `CIRCLE_PITCH` up and down; distance and framing stay.
    """
    azimuth = np.arctan2(cam2head[0, 3], cam2head[2, 3])
    views = []
    for a in np.linspace(0, 2 * np.pi, frames, endpoint=False):
        pitch = _turn([1.0, 0.0, 0.0], -np.radians(CIRCLE_PITCH) * np.cos(a))
        yaw = _turn([0.0, 1.0, 0.0], np.radians(CIRCLE_YAW) * np.sin(a))
        views.append(yaw @ pitch @ _turn([0.0, 1.0, 0.0], -azimuth) @ cam2head)
    return np.stack(views)


def turned_camera(cam2head: Float[np.ndarray, "4 4"], degrees: float) -> Float[np.ndarray, "4 4"]:
    """A camera turned about the head's vertical axis, towards the person's left."""
    return _turn([0.0, 1.0, 0.0], np.radians(degrees)) @ cam2head


def _turn(axis: list[float], angle: float) -> Float[np.ndarray, "4 4"]:
    """A rotation by `angle` radians about an axis through the head's origin."""
    return cameras.rigid(cameras.axis_angle(np.array(axis), angle), np.zeros(3))


def read_camera_path(
    path: str | os.PathLike,
) -> tuple[Float[np.ndarray, "E 4 4"], Float[np.ndarray, "E 3 3"] | None]:
    """Cameras from a JSON file: {"cam2head": [E of 4x4], "K": [E of 3x3, or one, or left out]}.

    `cam2head` is in the canonical head frame (metres, OpenCV axes), `K` divided by the image size.

    Returns:
      The cameras, and their intrinsics if the file has them.

    Raises:
      UserError: no such file, no such JSON, or numbers that are no cameras.
    """
    try:
        if os.stat(path).st_size > MAX_PATH_BYTES:
            raise UserError(f"{path} is over {MAX_PATH_BYTES >> 20} MiB; expected a camera path")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        cam2head = np.array(content["cam2head"], np.float64)
        K = np.array(content["K"], np.float64) if "K" in content else None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a camera path"
        ) from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f'{path} is no camera path ({type(error).__name__}); expected JSON: {{"cam2head": '
            '[4x4 matrices], "K": [3x3 matrices, optional]}'
        ) from None
    if cam2head.ndim != 3 or not len(cam2head):
        raise UserError(
            f"{path}: cam2head must be [E, 4, 4], E cameras, not {list(cam2head.shape)}"
        )
    if K is not None:
        if K.shape not in ((3, 3), (len(cam2head), 3, 3)):
            raise UserError(
                f"{path}: K must be [3, 3], or [{len(cam2head)}, 3, 3] for as many cameras, not "
                f"{list(K.shape)}"
            )
        K = np.broadcast_to(K, (len(cam2head), 3, 3))
    try:
        check_camera(cam2head, np.eye(3) if K is None else K)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return cam2head, K
