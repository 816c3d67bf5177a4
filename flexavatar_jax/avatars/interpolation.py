"""Avatar codes between two people, or four."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from data_pipelines.errors import UserError

METHODS = ("slerp", "linear")


def interpolate(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "N D"],
    weights: Sequence[float] | Float[np.ndarray, "E"],
    method: str = "slerp",
) -> Float[np.ndarray, "E N D"]:
    """Codes on the way from `a` (weight 0) to `b` (weight 1).

    "linear" is a straight line. "slerp" goes along the arc between each token of `a` and of `b`,
    its length changing evenly, so that tokens do not shrink half way.
    """
    if method not in METHODS:
        raise UserError(f"--method is {method!r}; expected {' or '.join(METHODS)}")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    t = np.asarray(weights, np.float64)[:, None, None]
    if method == "linear":
        return ((1 - t) * a + t * b).astype(np.float32)
    lengths = [np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b)]
    u, v = a / lengths[0], b / lengths[1]
    angle = np.arccos(np.clip(np.sum(u * v, axis=-1, keepdims=True), -1, 1))
    # Where the arc is (nearly) none, or half a circle of no certain plane, it is a line.
    flat = np.minimum(angle, np.pi - angle) < 1e-4
    sine = np.where(flat, 1, np.sin(angle))
    arc = (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / sine
    line = (1 - t) * u + t * v
    length = (1 - t) * lengths[0] + t * lengths[1]
    return (length * np.where(flat, line, arc)).astype(np.float32)


def path_through(
    codes: Float[np.ndarray, "P N D"], frames: int, method: str = "slerp"
) -> tuple[Float[np.ndarray, "frames N D"], Float[np.ndarray, "frames P"]]:
    """Codes on the way through all of `codes`, as long between any two, and each one's weight.

    Raises:
      UserError: fewer than two codes, or than two frames.
    """
    if len(codes) < 2:
        raise UserError("there is one avatar; give two or more to go between")
    if frames < 2:
        raise UserError(f"--frames is {frames}; expected 2 or more")
    way = np.linspace(0, len(codes) - 1, frames)
    leg = np.minimum(way.astype(int), len(codes) - 2)
    weights = np.zeros((frames, len(codes)))
    weights[np.arange(frames), leg + 1] = way - leg
    weights[np.arange(frames), leg] = 1 - (way - leg)
    path = [
        interpolate(codes[i], codes[i + 1], way[leg == i] - i, method)
        for i in range(len(codes) - 1)
    ]
    return np.concatenate(path), weights


def corner_grid(
    codes: Float[np.ndarray, "4 N D"], side: int, method: str = "slerp"
) -> tuple[Float[np.ndarray, "side side N D"], Float[np.ndarray, "side side 4"]]:
    """Codes of a square whose corners are `codes` (upper left, upper right, lower left, lower
    right), and each corner's weight.

    Raises:
      UserError: another number of codes, or a side below 2.
    """
    if len(codes) != 4:
        raise UserError(f"a grid has four corners, and there are {len(codes)} avatars")
    if side < 2:
        raise UserError(f"--grid is {side}; expected 2 or more")
    t = np.linspace(0, 1, side)
    left, right = (
        interpolate(codes[0], codes[2], t, method),
        interpolate(codes[1], codes[3], t, method),
    )
    rows = np.stack([interpolate(a, b, t, method) for a, b in zip(left, right, strict=True)])
    y, x = t[:, None], t[None, :]
    weights = [(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x]
    return rows, np.stack(weights, axis=-1)
