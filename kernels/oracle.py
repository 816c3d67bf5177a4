"""The reference that every backend is held to: the contract of `rasterize` in plain float64 NumPy.

No tiles, no batches, forward only. Splats are blended one after another over the pixels of their
bounding box. Gradients are checked against finite differences of this file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class OracleSplats(NamedTuple):
    """What `project` returns, for one image."""

    means: Float[np.ndarray, "N 2"]
    """In pixels."""
    covariances: Float[np.ndarray, "N 2 2"]
    """With 0.3 added."""
    opacities: Float[np.ndarray, "N"]
    depths: Float[np.ndarray, "N"]


class OracleRender(NamedTuple):
    """What `render` and `blend` return, for one image."""

    color: Float[np.ndarray, "H W C"]
    alpha: Float[np.ndarray, "H W"]
    depth: Float[np.ndarray, "H W"]
    fragile: Bool[np.ndarray, "H W"]
    """Pixels where rounding may decide: an alpha within 0.1% of 1/255, a transmittance within 1% of
    1e-4, or two blended splats whose order in depth is below float32's resolution."""


def render(
    means: Float[np.ndarray, "N 3"],
    quats: Float[np.ndarray, "N 4"],
    scales: Float[np.ndarray, "N 3"],
    opacities: Float[np.ndarray, "N"],
    colors: Float[np.ndarray, "N C"],
    viewmat: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    *,
    width: int,
    height: int,
    background: Float[np.ndarray, "C"] | None = None,
    near: float = 0.01,
    antialiased: bool = False,
) -> OracleRender:
    """Render one image; arguments as for `kernels.rasterize`, all computed in float64."""
    splats = project(
        means, quats, scales, opacities, viewmat, K,
        width=width, height=height, near=near, antialiased=antialiased,
    )  # fmt: skip
    return blend(splats, colors, width=width, height=height, background=background)


def project(
    means: Float[np.ndarray, "N 3"],
    quats: Float[np.ndarray, "N 4"],
    scales: Float[np.ndarray, "N 3"],
    opacities: Float[np.ndarray, "N"],
    viewmat: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    *,
    width: int,
    height: int,
    near: float = 0.01,
    antialiased: bool = False,
) -> OracleSplats:
    """Gaussians as one image sees them; those nearer than `near` have opacity 0."""
    means, quats, scales, opacities, viewmat, K = (
        np.asarray(a, np.float64) for a in (means, quats, scales, opacities, viewmat, K)
    )
    points = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    centres, covariances = np.zeros((len(means), 2)), np.tile(np.eye(2), (len(means), 1, 1))
    opacities = np.where(points[:, 2] >= near, opacities, 0.0)
    for i in np.flatnonzero(points[:, 2] >= near):
        centres[i], covariance = _project(points[i], quats[i], scales[i], viewmat, K, width, height)
        covariances[i] = covariance + 0.3 * np.eye(2)
        if antialiased:
            determinant = max(np.linalg.det(covariance), 0.0)
            opacities[i] *= np.sqrt(determinant / np.linalg.det(covariances[i]))
    return OracleSplats(centres, covariances, opacities, points[:, 2])


def blend(
    splats: OracleSplats,
    colors: Float[np.ndarray, "N C"],
    *,
    width: int,
    height: int,
    background: Float[np.ndarray, "C"] | None = None,
) -> OracleRender:
    """Render one image of splats."""
    colors = np.asarray(colors, np.float64)
    color = np.zeros((height, width, colors.shape[-1]))
    depth = np.zeros((height, width))
    transmittance = np.ones((height, width))
    ended = np.zeros((height, width), bool)
    fragile = np.zeros((height, width), bool)
    last_depth = np.full((height, width), -np.inf)

    for i in np.argsort(splats.depths, kind="stable"):
        centre, covariance, opacity, z = (a[i] for a in splats)
        if not opacity * 255 > 1 - 1e-3:
            continue
        half = np.sqrt(2 * (np.log(255 * opacity) + 2e-3) * np.diag(covariance))
        low = np.clip(np.ceil(centre - half - 0.5), 0, [width, height]).astype(int)
        high = np.clip(np.floor(centre + half - 0.5) + 1, 0, [width, height]).astype(int)
        if np.any(high <= low):
            continue
        window = np.s_[low[1] : high[1], low[0] : high[0]]

        dx = np.arange(low[0], high[0]) + 0.5 - centre[0]
        dy = np.arange(low[1], high[1])[:, None] + 0.5 - centre[1]
        inverse = np.linalg.inv(covariance)
        sigma = 0.5 * (inverse[0, 0] * dx**2 + inverse[1, 1] * dy**2) + inverse[0, 1] * dx * dy
        alpha = np.minimum(0.99, opacity * np.exp(-sigma))

        before = transmittance[window]
        after = before * (1 - alpha)
        live = ~ended[window]
        drawn = live & (alpha >= 1 / 255)
        close = np.abs(z - last_depth[window]) < 1e-6 * z
        # float32 orders equal depths as float64 does only if they're equal to the last bit.
        equal = z == last_depth[window]
        fragile[window] |= (
            (live & (np.abs(255 * alpha - 1) < 1e-3))
            | (drawn & (np.abs(after / 1e-4 - 1) < 1e-2))
            | (drawn & close & ~equal)
        )
        ends = drawn & (after <= 1e-4)
        blended = drawn & ~ends
        weight = np.where(blended, alpha * before, 0.0)
        color[window] += weight[..., None] * colors[i]
        depth[window] += weight * z
        transmittance[window] = np.where(blended, after, before)
        ended[window] |= ends
        last_depth[window] = np.where(drawn, z, last_depth[window])

    alpha = 1 - transmittance
    if background is not None:
        color = color + transmittance[..., None] * np.asarray(background, np.float64)
    return OracleRender(color, alpha, depth / np.maximum(alpha, 1e-10), fragile)


def _project(point, quat, scale, viewmat, K, width, height):
    """Centre [2] and covariance [2, 2] in pixels of a Gaussian at camera-space `point`."""
    (fx, fy), (cx, cy) = (K[0, 0], K[1, 1]), (K[0, 2], K[1, 2])
    x, y, z = point
    w, a, b, c = quat / max(np.linalg.norm(quat), 1e-300)
    R = np.array(
        [
            [1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)],
            [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
            [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)],
        ]
    )
    # x/z and y/z stay inside the frustum widened by 0.3 tan(fov/2) on each side.
    widen_x, widen_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    u = np.clip(x / z, -cx / fx - widen_x, (width - cx) / fx + widen_x)
    v = np.clip(y / z, -cy / fy - widen_y, (height - cy) / fy + widen_y)
    J = np.array([[fx / z, 0, -fx * u / z], [0, fy / z, -fy * v / z]])
    M = J @ viewmat[:3, :3] @ R * scale
    return np.array([fx * x / z + cx, fy * y / z + cy]), M @ M.T
