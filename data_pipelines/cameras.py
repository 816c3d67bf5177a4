"""Camera and rotation maths in NumPy: the one place where conventions are converted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
"""Turns camera axes from OpenGL (y up, z backward) to OpenCV (y down, z forward), and back."""


def rotation_from_6d(r: Float[np.ndarray, "*b 6"]) -> Float[np.ndarray, "*b 3 3"]:
    """Rotation whose first two *rows* are `r`'s two 3-vectors, orthonormalised by Gram-Schmidt.

    Source: Zhou et al., On the Continuity of Rotation Representations (CVPR 2019), with rows
    where the paper has columns, as FLAME trackers store it.
    """
    a, b = r[..., :3], r[..., 3:]
    x = a / np.linalg.norm(a, axis=-1, keepdims=True)
    y = b - np.sum(x * b, axis=-1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], axis=-2)


def rotation_to_6d(R: Float[np.ndarray, "*b 3 3"]) -> Float[np.ndarray, "*b 6"]:
    """The first two rows of a rotation; the inverse of `rotation_from_6d`."""
    return np.concatenate([R[..., 0, :], R[..., 1, :]], axis=-1)


def nearest_rotation(M: Float[np.ndarray, "*b 3 3"]) -> Float[np.ndarray, "*b 3 3"]:
    """The rotation nearest to `M` in the Frobenius norm, by SVD."""
    u, _, vt = np.linalg.svd(M)
    sign = np.sign(np.linalg.det(u @ vt))
    u = u * np.stack([np.ones_like(sign), np.ones_like(sign), sign], axis=-1)[..., None, :]
    return u @ vt


def rigid(
    R: Float[np.ndarray, "*b 3 3"], t: Float[np.ndarray, "*b 3"]
) -> Float[np.ndarray, "*b 4 4"]:
    """The 4x4 transform x -> R x + t."""
    T = np.zeros((*R.shape[:-2], 4, 4), R.dtype)
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = R, t, 1.0
    return T


def invert_rigid(T: Float[np.ndarray, "*b 4 4"]) -> Float[np.ndarray, "*b 4 4"]:
    """Inverse of a rigid transform (transposed rotation, no matrix inversion)."""
    R = np.swapaxes(T[..., :3, :3], -1, -2)
    return rigid(R, -np.einsum("...ij,...j->...i", R, T[..., :3, 3]))


def axis_angle(
    axis: Sequence[float] | Num[np.ndarray, "3"], angle: float
) -> Float[np.ndarray, "3 3"]:
    """Rotation by `angle` radians about `axis`, right-handed (Rodrigues' formula)."""
    x, y, z = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    S = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * S + (1 - np.cos(angle)) * S @ S


def look_at(
    position: Float[np.ndarray, "3"],
    target: Float[np.ndarray, "3"],
    up: Float[np.ndarray, "3"] | None = None,
) -> Float[np.ndarray, "4 4"]:
    """Camera-to-world transform (OpenCV axes) of a camera at `position` looking at `target`.

    `up` is the world's up, by default +y.
    """
    up = np.array([0.0, 1.0, 0.0]) if up is None else np.asarray(up, np.float64)
    z = np.asarray(target, np.float64) - position
    z = z / np.linalg.norm(z)
    x = np.cross(z, up)
    x = x / np.linalg.norm(x)
    return rigid(np.stack([x, np.cross(z, x), z], axis=-1), np.asarray(position, np.float64))


def orbit(
    azimuth: float, elevation: float, distance: float, target: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "4 4"]:
    """Camera-to-head transform on a sphere about `target` in the head frame.

    Azimuth 0 faces the face from +z, +90 degrees stands at +x (the person's left); angles in
    degrees, distance in metres.
    """
    a, e = np.radians(azimuth), np.radians(elevation)
    direction = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    return look_at(target + distance * direction, target)
