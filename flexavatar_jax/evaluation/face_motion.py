"""Do mouth and eyes do what the code says? How they change, in the renderings and in the truth.

About each a small patch is cut from a frontal picture: points of a plane before the lips or the
eyes, fixed in the head frame, seen through the picture's own camera. So the patch stays on them
while the head moves, and what changes in it is expression.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.ndimage import map_coordinates

from data_pipelines.cameras import axis_angle, invert_rigid, rotation_to_6d
from data_pipelines.frame import Frame, expression_part
from data_pipelines.head_mesh import EYE_HEIGHT, MOUTH_HEIGHT
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.people import Person, on_white

FRONTAL = 30.0
"""Degrees off the face's axis up to which a camera sees the face, and patches are on it."""

OPEN_JAW = 0.35
"""Radians that the jaw is opened by to see whether it opens: about as far as in talking loudly."""

GAZE = 0.4
"""Radians that the eyes are turned by to either side to see whether they turn."""


class Patch(NamedTuple):
    """An upright rectangle before the face: metres in the head frame, centred about x = 0."""

    width: float
    height: float
    y: float
    z: float


PATCHES = {
    # From cheek to cheek, and from the nose's tip to the chin.
    "mouth": Patch(width=0.064, height=0.056, y=MOUTH_HEIGHT - 0.008, z=0.075),
    # From temple to temple, and from the brows to below the lids.
    "eyes": Patch(width=0.100, height=0.024, y=EYE_HEIGHT, z=0.050),
}


def cut(
    image: Float[np.ndarray, "H W 3"],
    cam2head: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    patch: Patch,
    *,
    samples: int = 16,
) -> Float[np.ndarray, "samples samples 3"]:
    """A patch of a picture, sampled bilinearly; `K` is divided by the image size."""
    x, y = np.meshgrid(
        np.linspace(-0.5, 0.5, samples) * patch.width,
        patch.y + np.linspace(0.5, -0.5, samples) * patch.height,
    )
    points = np.stack([x, y, np.full_like(x, patch.z), np.ones_like(x)], axis=-1)
    in_camera = points @ invert_rigid(np.asarray(cam2head, np.float64))[:3].T
    projected = in_camera @ np.asarray(K, np.float64).T
    at = projected[..., :2] / projected[..., 2:] * image.shape[0] - 0.5
    return np.stack(
        [
            map_coordinates(image[..., c], [at[..., 1], at[..., 0]], order=1, mode="nearest")
            for c in range(3)
        ],
        axis=-1,
    )


def expression_following(
    clips: list[list[Frame]], predictions: list[Float[np.ndarray, "..."]]
) -> dict[str, float]:
    """Correlation of the mouth's and the eyes' changes over clips, rendered against true.

    Of each clip the mean over its moments is taken off, so that neither who it is nor where the
    light comes from counts. 1 is perfect, a mouth that never moves gets 0. Eyes change by blinks
    and by where they look.

    Args:
      clips: a person's frames before one camera each, see `people.read_clip`.
      predictions: their avatars' images [T, H, W, 3], on white; empty for an empty clip.

    Returns:
      For each of PATCHES `mouth_correlation` and `mouth_strength` (rendered change over true
      change, root mean squares); nothing if no clip has two moments before a frontal camera.
    """
    found = {}
    for name, patch in PATCHES.items():
        rendered, true = [], []
        for clip, images in zip(clips, predictions, strict=True):
            seen = [i for i, frame in enumerate(clip) if _off_axis(frame.cam2head) < FRONTAL]
            if len(seen) < 2:
                continue
            truths = [on_white(frame) for frame in clip]
            for result, pictures in ((rendered, images), (true, truths)):
                patches = np.stack(
                    [cut(pictures[i], clip[i].cam2head, clip[i].K, patch) for i in seen]
                )
                result.append((patches - patches.mean(axis=0)).ravel())
        if not true:
            return {}
        rendered, true = np.concatenate(rendered), np.concatenate(true)
        strength = np.sqrt(np.mean(rendered**2) / max(np.mean(true**2), 1e-12))
        correlation = np.mean(rendered * true) / max(np.std(rendered) * np.std(true), 1e-12)
        found[f"{name}_correlation"] = round(float(correlation), 4)
        found[f"{name}_strength"] = round(float(strength), 4)
    return found


def _off_axis(cam2head: Float[np.ndarray, "4 4"]) -> float:
    """Degrees between the face's axis and the direction to the camera."""
    position = cam2head[:3, 3]
    return float(np.degrees(np.arccos(position[2] / np.linalg.norm(position))))


def with_jaw(code: Float[np.ndarray, "135"], angle: float) -> Float[np.ndarray, "135"]:
    """A code whose jaw is opened by `angle` radians and turned to no side."""
    return _with(code, "jaw", rotation_to_6d(axis_angle(np.array([1.0, 0, 0]), angle)))


def with_gaze(code: Float[np.ndarray, "135"], angle: float) -> Float[np.ndarray, "135"]:
    """A code whose open eyes look `angle` radians to the person's left, and neither up nor down."""
    turned = rotation_to_6d(axis_angle(np.array([0, 1.0, 0]), angle))
    return _with(_with(code, "eyes", np.tile(turned, 2)), "eyelids", 0.0)


def _with(code: np.ndarray, part: str, value: np.ndarray | float) -> np.ndarray:
    changed = np.array(code, np.float32)
    changed[expression_part(part)] = value
    return changed


class FaceMotion(NamedTuple):
    """An avatar from the input's camera: what its face does when the code says so.

    Attributes:
      images: jaw closed, jaw open, eyes to the person's right, eyes to the left.
      jaw_change, gaze_change: mean absolute difference of the mouth's patch with the jaw closed
        and open, and of the eyes' looking either way, RGB in [0, 1].
    """

    images: Float[np.ndarray, "4 size size 3"]
    jaw_change: float
    gaze_change: float


def face_motion(animator: Animator, person: Person, code: np.ndarray, size: int) -> FaceMotion:
    """Opens an avatar's jaw and turns its eyes, all else as in the input."""
    source = person.input
    cameras = source.cam2head, source.K
    expressions = [
        *(with_jaw(source.expression, angle) for angle in (0.0, OPEN_JAW)),
        *(with_gaze(source.expression, angle) for angle in (-GAZE, GAZE)),
    ]
    images = animator.render(
        code,
        np.stack(expressions),
        *(np.repeat(x[None], len(expressions), axis=0) for x in cameras),
        size=size,
    )

    def change(patch: Patch, a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean(np.abs(cut(a, *cameras, patch) - cut(b, *cameras, patch))))

    closed, opened, right, left = images
    return FaceMotion(
        images, change(PATCHES["mouth"], closed, opened), change(PATCHES["eyes"], right, left)
    )
