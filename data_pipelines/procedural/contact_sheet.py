"""A picture of procedural people: a row each, from all sides and with a few faces."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import expression_part, neutral_code
from data_pipelines.procedural.expression import BLENDSHAPES
from data_pipelines.procedural.figure import Figure
from data_pipelines.procedural.person import sample_person
from data_pipelines.procedural.renderer import render

_STREAM = 3
"""Keeps the people of contact sheets apart from those of the data sets."""

VIEWS = ((0, 0), (40, 8), (90, 0), (145, 15), (180, 0))
"""Azimuth and elevation in degrees of the pictures with a relaxed face."""


def contact_sheet(people: int, size: int, seed: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """People from front to back with a relaxed face, then talking, smiling and pouting.

    Raises:
      ValueError: if a number is out of its range.
    """
    if people < 1 or not 16 <= size <= 512 or seed < 0:
        raise UserError(
            "a contact sheet needs 1 or more people, a size of 16 to 512 pixels and a seed from 0 "
            f"on, got {people} people, size {size}, seed {seed}"
        )
    K = np.array([[3.05, 0, 0.5], [0, 3.05, 0.5], [0, 0, 1]])
    backdrop = np.full((size, size, 3), 0.93, np.float32)
    relaxed = neutral_code()
    shots = [(azimuth, elevation, relaxed) for azimuth, elevation in VIEWS]
    shots += [(azimuth, 0, code) for azimuth, code in zip((15, 0, -15), _faces(), strict=True)]
    rows = []
    for i in tqdm(range(people), desc="people", unit="row"):
        figure = Figure(sample_person(np.random.default_rng([seed, _STREAM, i])), size)
        row = []
        for azimuth, elevation, code in shots:
            camera = cameras.orbit(azimuth, elevation, 1.0, np.array([0, 0, -0.02]))
            row.append(render(figure.scene(code), camera, K, size, backdrop)[0])
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def _faces() -> list[Float[np.ndarray, "135"]]:
    """Three codes: an open mouth, a smile with closed eyes, a pout with eyes to the side."""
    talking, smiling, pouting = (neutral_code() for _ in range(3))
    jaw = cameras.axis_angle(np.array([1, 0, 0]), 0.32)
    talking[expression_part("jaw")] = cameras.rotation_to_6d(jaw)
    talking[BLENDSHAPES.index("smile")] = 0.8
    smiling[BLENDSHAPES.index("smile")] = 1.6
    smiling[BLENDSHAPES.index("upper_lip_up")] = 1.0
    smiling[BLENDSHAPES.index("brows_up")] = 1.5
    smiling[expression_part("eyelids")] = 1.0
    pouting[BLENDSHAPES.index("pucker")] = 1.8
    pouting[BLENDSHAPES.index("brows_together")] = 1.5
    gaze = cameras.rotation_to_6d(cameras.axis_angle(np.array([0, 1, 0]), 0.4))
    pouting[expression_part("eyes")] = np.tile(gaze, 2)
    return [talking, smiling, pouting]
