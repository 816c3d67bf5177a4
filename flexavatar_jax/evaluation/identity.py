"""Identity without a network: whether avatars look more like their own person than like others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data_pipelines.frame import Frame
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.people import SECTORS, Person, evenly_spaced, on_white, sector

IMAGES_PER_SECTOR = 4
"""Pictures of a person from a sector that avatars are held against: each is rendered of all."""


def identity_distances(
    animator: Animator,
    codes: Sequence[Float[np.ndarray, "N D"]],
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


def identity_by_sector(
    animator: Animator,
    people: Sequence[Person],
    codes: Sequence[Float[np.ndarray, "N D"]],
    size: int,
) -> dict[str, float]:
    """`rank1` over all views and from each sector: `identity_all`, `identity_SECTOR`.

    Sectors from which somebody has no picture are left out.
    """
    distances = {}
    for name in SECTORS:
        seen = [[t for t in person.targets if sector(t.cam2head) == name] for person in people]
        if all(seen):
            frames = [[f[i] for i in evenly_spaced(len(f), IMAGES_PER_SECTOR)] for f in seen]
            distances[name] = identity_distances(animator, codes, frames, size=size)
    if distances:
        distances["all"] = np.mean(list(distances.values()), axis=0)
    return {f"identity_{name}": round(rank1(found), 4) for name, found in distances.items()}
