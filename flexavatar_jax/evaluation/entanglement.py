"""Does the avatar depend on what it must not? Head pose in the code, and the camera.

In monocular video the code's head pose tells where the camera stands, so a model may learn to show
the right picture for that camera only (the paper's section 3.2).
"""

from __future__ import annotations

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.frame import expression_part
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.people import Person
from flexavatar_jax.training.losses import psnr

TURNS = (-35.0, 35.0)
"""Degrees that the code's head pose is turned by; monocular people look up to 40 to the sides."""


def turned(code: Float[np.ndarray, "135"], degrees: float) -> Float[np.ndarray, "135"]:
    """A code whose head, as a tracker would report it, has turned to a side in the world."""
    result = np.array(code, np.float32)
    pose = cameras.rotation_from_6d(np.asarray(code[expression_part("R")], np.float64))
    turn = cameras.axis_angle(np.array([0.0, 1.0, 0.0]), np.radians(degrees))
    result[expression_part("R")] = cameras.rotation_to_6d(turn @ pose)
    return result


def steadiness(
    animator: Animator, people: list[Person], codes: list[Float[ArrayLike, "N D"]], size: int
) -> float:
    """PSNR (dB) between an avatar and itself when only the head pose in its code turns.

    The camera stays where it is in the head frame, so nothing should change: the higher the better.
    """
    found = []
    for person, code in zip(people, codes, strict=True):
        source = person.input
        expressions = [source.expression, *(turned(source.expression, by) for by in TURNS)]
        images = animator.render(
            code,
            np.stack(expressions),
            np.repeat(source.cam2head[None], len(expressions), axis=0),
            np.repeat(source.K[None], len(expressions), axis=0),
            size=size,
        )
        found += [
            float(x)
            for x in np.asarray(psnr(images[1:], np.broadcast_to(images[:1], images[1:].shape)))
        ]
    return round(float(np.mean(np.minimum(found, 99.0))), 4)
