"""Identity without a network: whether avatars look more like their own person than like others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data_pipelines.frame import Frame
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.people import on_white


def identity_distances(
    animator: Animator,
    codes: Float[np.ndarray, "P N D"],
    frames: Sequence[Sequence[Frame]],
    *,
    size: int,
) -> Float[np.ndarray, "P P"]:
    """How unlike avatar i, rendered as person j stands, is person j.

    Expression and camera are person j's own, so that who it is makes the difference.

    Args:
      codes: an avatar code a person.
      frames: of each person, frames that the avatar was not made from.
      size: pixels a side at which they are compared; the frames must have it.

    Returns:
      Row i, column j: the mean over person j's frames of the mean squared difference (RGB in
      [0, 1], on white).
    """
    distances = np.zeros((len(codes), len(frames)))
    with tqdm(total=distances.size, desc="telling people apart", unit="pair") as bar:
        for j, stands in enumerate(frames):
            truths = np.stack([on_white(frame) for frame in stands])
            tracking = [np.stack([getattr(f, x) for f in stands]) for x in _TRACKING]
            for i, code in enumerate(codes):
                images = animator.frames(code, *tracking, size=size)
                errors = (
                    np.mean((a - b) ** 2, dtype=np.float64)
                    for a, b in zip(images, truths, strict=True)
                )
                distances[i, j] = np.mean(list(errors))
                bar.update()
    return distances


_TRACKING = ("expression", "cam2head", "K")


def rank1(distances: Float[np.ndarray, "P P"]) -> float:
    """How often an avatar is nearest to its own person among all: 1 always, 1 / P by chance.

    People whose pictures are easy for every avatar would draw all to them: each person's column is
    first taken relative to its mean over avatars.

    Args:
      distances: row i, column j: avatar i from person j; avatar i was made of person i.
    """
    relative = distances / np.mean(distances, axis=0)
    return float(np.mean(np.argmin(relative, axis=1) == np.arange(len(distances))))
