"""What procedural people do in front of the camera: sequences of expression codes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from data_pipelines import cameras
from data_pipelines.frame import EXPRESSION_SIZE, expression_part
from data_pipelines.procedural.expression import BLENDSHAPES

_LIVELINESS = {
    "smile": 0.75,
    "pucker": 0.5,
    "brows_up": 0.8,
    "brows_together": 0.6,
    "upper_lip_up": 0.4,
    "lower_lip_down": 0.4,
    "mouth_left": 0.3,
    "cheeks_out": 0.4,
    "left_smile": 0.3,
    "inner_brows_up": 0.5,
}
"""Standard deviation of each blendshape's number."""

TRACKER_NOISE = 0.15
"""Standard deviation of the numbers of `exp` that move nothing."""


def perform(
    rng: np.random.Generator, timesteps: int, turn: float = 0.0
) -> Float[np.ndarray, "t 135"]:
    """Somebody talks, makes faces, blinks and looks about.

    Args:
      timesteps: length; moments follow each other at a few a second.
      turn: how far the head turns, ratio: 0 faces the world's z axis but for small movements, at 1
        it looks up to about 40 degrees to the sides.
    """
    codes = np.zeros((timesteps, EXPRESSION_SIZE))

    def wander(size: int, smoothness: float) -> np.ndarray:
        """Smooth random curves of unit standard deviation, [timesteps, size]."""
        margin = int(4 * smoothness) + 1
        noise = rng.standard_normal((timesteps + 2 * margin, size))
        smooth = gaussian_filter1d(noise, smoothness, axis=0)[margin:-margin]
        return smooth * np.sqrt(2 * np.sqrt(np.pi) * smoothness)

    exp = codes[:, expression_part("exp")]
    exp[:] = TRACKER_NOISE * wander(exp.shape[1], 1.5)
    liveliness = [_LIVELINESS[name] for name in BLENDSHAPES]
    exp[:, : len(BLENDSHAPES)] = liveliness * wander(len(BLENDSHAPES), 1.5)

    # Talking comes and goes; the jaw opens up to some 25 degrees.
    loud = np.clip(0.5 + 0.8 * wander(1, 2.0), 0, 1.2)[:, 0]
    jaw = 0.34 * loud * np.abs(wander(1, 0.7)[:, 0]).clip(0, 1.3)
    sideways = 0.03 * wander(2, 1.5)
    codes[:, expression_part("jaw")] = _sixes(jaw, sideways[:, 0], sideways[:, 1])

    gaze = np.repeat(rng.normal(0, [0.12, 0.30], (timesteps // 2 + 1, 2)), 2, axis=0)[:timesteps]
    codes[:, expression_part("eyes")] = np.tile(_sixes(gaze[:, 0], gaze[:, 1], 0 * jaw), 2)
    blink = np.where(rng.random(timesteps) < 0.15, rng.uniform(0.6, 1.0, timesteps), 0.0)
    lids = np.clip(0.06 + 0.07 * wander(1, 2.0)[:, 0], 0, 0.3)
    codes[:, expression_part("eyelids")] = np.maximum(blink, lids)[:, None]

    neck = wander(3, 2.0) * [0.06, 0.09, 0.04]
    codes[:, expression_part("neck")] = _sixes(*neck.T)
    body = wander(3, 2.5) * [0.05 + 0.10 * turn, 0.06 + 0.36 * turn, 0.03 + 0.04 * turn]
    body = np.clip(body, -0.7, 0.7)
    codes[:, expression_part("R")] = _sixes(*body.T)
    codes[:, expression_part("t")] = wander(3, 2.5) * [0.006, 0.005, 0.012]
    return codes.astype(np.float32)


def as_tracked(code: Float[np.ndarray, "135"], reported_turn: float) -> Float[np.ndarray, "135"]:
    """The code that a tracker of one camera's video reports of somebody who did `code`.

    From one camera a shallow head that turns far and a deep one that turns less look much the same
    (the bas-relief ambiguity: Belhumeur, Kriegman and Yuille 1999), and trackers are drawn to the
    smaller turn.

    Args:
      reported_turn: the part of the head's turn, its R, that is reported; 1 is the truth.
    """
    if reported_turn == 1:
        return code
    turn = Rotation.from_matrix(cameras.rotation_from_6d(code[expression_part("R")])).as_rotvec()
    reported = code.copy()
    reported[expression_part("R")] = cameras.rotation_to_6d(
        Rotation.from_rotvec(reported_turn * turn).as_matrix()
    )
    return reported


def _sixes(pitch: np.ndarray, yaw: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """[T, 6] rotations from angles in radians about x, y and z."""
    axes = np.eye(3)
    rotations = [
        cameras.axis_angle(axes[1], b)
        @ cameras.axis_angle(axes[0], a)
        @ cameras.axis_angle(axes[2], c)
        for a, b, c in zip(pitch, yaw, roll, strict=True)
    ]
    return cameras.rotation_to_6d(np.array(rotations))
