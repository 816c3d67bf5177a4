"""Does the mouth do what the code says? How it changes, in the renderings and in the truth.

Around the mouth a small patch is cut from each frontal picture: points of a plane before the lips,
fixed in the head frame, seen through the picture's own camera. So the patch stays on the mouth
while the head moves, and what changes in it is expression.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.ndimage import map_coordinates

from data_pipelines.cameras import invert_rigid
from data_pipelines.frame import Frame, expression_part
from data_pipelines.head_mesh import MOUTH_HEIGHT
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.people import Person, on_white

FRONTAL = 30.0
"""Degrees off the face's axis up to which a camera sees the mouth, and the patch is on it."""

PATCH_WIDTH, PATCH_HEIGHT = 0.064, 0.056
"""Metres: from cheek to cheek, and from the nose's tip to the chin."""

PATCH_DEPTH = 0.075
"""Metres before the head's origin: the lips."""

OPEN_JAW = 0.35
"""Radians that the jaw is opened by to see whether it opens: about as far as in talking loudly."""


def mouth_patch(
    image: Float[np.ndarray, "H W 3"],
    cam2head: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    *,
    samples: int = 16,
) -> Float[np.ndarray, "samples samples 3"]:
    """The region of the mouth, sampled bilinearly; `K` is divided by the image size."""
    x, y = np.meshgrid(
        np.linspace(-0.5, 0.5, samples) * PATCH_WIDTH,
        MOUTH_HEIGHT - 0.008 + np.linspace(0.5, -0.5, samples) * PATCH_HEIGHT,
    )
    points = np.stack([x, y, np.full_like(x, PATCH_DEPTH), np.ones_like(x)], axis=-1)
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
    """Correlation of the mouth's changes over clips before one camera, rendered against true.

    Of each clip the mean over its moments is taken off, so that neither who it is nor where the
    light comes from counts. 1 is perfect, a mouth that never moves gets 0.

    Args:
      clips: a person's frames before a camera each, see `people.read_clip`.
      predictions: their avatars' images [T, H, W, 3], on white; empty for an empty clip.

    Returns:
      `mouth_correlation` and `mouth_strength` (rendered change over true change, root mean
      squares); nothing if no clip has two moments before a frontal camera.
    """
    rendered, true = [], []
    for clip, images in zip(clips, predictions, strict=True):
        seen = [i for i, frame in enumerate(clip) if _off_axis(frame.cam2head) < FRONTAL]
        if len(seen) < 2:
            continue
        truths = [on_white(frame) for frame in clip]
        for result, pictures in ((rendered, images), (true, truths)):
            patches = np.stack(
                [mouth_patch(pictures[i], clip[i].cam2head, clip[i].K) for i in seen]
            )
            result.append((patches - patches.mean(axis=0)).ravel())
    if not true:
        return {}
    rendered, true = np.concatenate(rendered), np.concatenate(true)
    strength = np.sqrt(np.mean(rendered**2) / np.mean(true**2))
    correlation = np.mean(rendered * true) / max(np.std(rendered) * np.std(true), 1e-12)
    return {
        "mouth_correlation": round(float(correlation), 4),
        "mouth_strength": round(float(strength), 4),
    }


def _off_axis(cam2head: Float[np.ndarray, "4 4"]) -> float:
    """Degrees between the face's axis and the direction to the camera."""
    position = cam2head[:3, 3]
    return float(np.degrees(np.arccos(position[2] / np.linalg.norm(position))))


def with_jaw(code: Float[np.ndarray, "135"], angle: float) -> Float[np.ndarray, "135"]:
    """A code whose jaw is opened by `angle` radians and turned to no side."""
    opened = np.array(code, np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    opened[expression_part("jaw")] = [1, 0, 0, 0, cos, -sin]
    return opened


def jaw_opening(
    animator: Animator, person: Person, code: np.ndarray, size: int
) -> tuple[Float[np.ndarray, "2 size size 3"], float]:
    """An avatar from the input's camera, jaw closed and open, and how much its mouth changes.

    The change is the mean absolute difference of the two mouth patches, RGB in [0, 1].
    """
    source = person.input
    images = animator.render(
        code,
        np.stack([with_jaw(source.expression, angle) for angle in (0.0, OPEN_JAW)]),
        np.repeat(source.cam2head[None], 2, axis=0),
        np.repeat(source.K[None], 2, axis=0),
        size=size,
    )
    closed, opened = (mouth_patch(image, source.cam2head, source.K) for image in images)
    return images, float(np.mean(np.abs(opened - closed)))
