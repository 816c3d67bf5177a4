"""Is an avatar the person? Each true picture is held against the avatars of all test people."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float

from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.people import SECTORS, Person, evenly_spaced, on_white, sector

IMAGES_PER_SECTOR = 4
"""Pictures of a person and sector that are looked up; each takes a rendering a test person."""


def identity_rank1(
    animator: Animator, people: list[Person], codes: list[Float[Array, "N D"]], size: int
) -> dict[str, float]:
    """How often a person's picture is nearest to that person's own avatar.

    All test people's avatars are rendered alike, with the picture's camera and expression; nearest
    is what has the smallest mean square difference. Chance is one over the number of people.

    Returns `identity_all` and `identity_SECTOR`, ratios; sectors without pictures are left out.
    """
    hits = {name: [] for name in SECTORS}
    for person, own in zip(people, range(len(people)), strict=True):
        sectors = np.array([sector(target.cam2head) for target in person.targets])
        chosen = []
        for name in SECTORS:
            there = np.flatnonzero(sectors == name)
            chosen += list(there[evenly_spaced(len(there), IMAGES_PER_SECTOR)])
        targets = [person.targets[i] for i in chosen]
        truths = np.stack([on_white(target) for target in targets])
        inputs = [
            np.stack([getattr(target, field) for target in targets])
            for field in ("expression", "cam2head", "K")
        ]
        distances = [
            np.mean((animator.render(code, *inputs, size=size) - truths) ** 2, axis=(1, 2, 3))
            for code in codes
        ]
        for i, nearest in zip(chosen, np.argmin(distances, axis=0), strict=True):
            hits[sectors[i]].append(nearest == own)
    every = [hit for name in SECTORS for hit in hits[name]]
    result = {"all": every, **{name: found for name, found in hits.items() if found}}
    return {f"identity_{name}": round(float(np.mean(found)), 4) for name, found in result.items()}
