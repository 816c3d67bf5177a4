"""One frame of a capture: what a shard holds, and what every data set is prepared into."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

MONOCULAR, MULTI_VIEW = SOURCES = 0, 1
"""Data sources; the numbers are the rows of the model's bias-sink embedding."""

EXPRESSION_PARTS = {"exp": 100, "eyes": 12, "eyelids": 2, "neck": 6, "jaw": 6, "R": 6, "t": 3}
"""Layout of an expression code, in order: FLAME's parameters, rotations as 6 numbers each."""

EXPRESSION_SIZE = sum(EXPRESSION_PARTS.values())


@dataclasses.dataclass(frozen=True)
class Frame:
    """A picture of a head with its camera and expression.

    Attributes:
      image: [H, W, 3] uint8 RGB, background as captured.
      mask: [H, W] uint8 foreground matte, 255 on the person.
      cam2head: [4, 4] float32, the camera in the canonical head frame (metres; x to the person's
        left, y up, z out of the face); camera axes as in OpenCV (x right, y down, z forward).
      K: [3, 3] float32 intrinsics divided by the image size.
      expression: [135] float32 in the order of `EXPRESSION_PARTS`.
      person, sequence, camera: names; a clip is one (person, sequence).
      timestep: index of the moment within the sequence.
      source: `MONOCULAR` or `MULTI_VIEW`.
    """

    image: np.ndarray
    mask: np.ndarray
    cam2head: np.ndarray
    K: np.ndarray
    expression: np.ndarray
    person: str
    sequence: str
    timestep: int
    camera: str
    source: int


def expression_part(name: str) -> slice:
    """Where the part `name` of `EXPRESSION_PARTS` lies in an expression code."""
    start = 0
    for part, size in EXPRESSION_PARTS.items():
        if part == name:
            return slice(start, start + size)
        start += size
    raise KeyError(f"no part {name!r} in an expression code; it has {', '.join(EXPRESSION_PARTS)}")


def neutral_code() -> Float[np.ndarray, "135"]:
    """The code of a relaxed face: eyes open, jaw closed, head upright at the origin."""
    code = np.zeros(EXPRESSION_SIZE, np.float32)
    for part in ("eyes", "neck", "jaw", "R"):
        code[expression_part(part)] = np.tile([1, 0, 0, 0, 1, 0], EXPRESSION_PARTS[part] // 6)
    return code
