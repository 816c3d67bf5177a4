"""The reference that every backend is held to: the contract of `rasterize` in plain float64 NumPy.

No tiles, no batches, forward only. Splats are blended one after another over the pixels of their
bounding box. Gradients are checked against finite differences of this file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class OracleRender(NamedTuple):
    """What `render` returns, for one image."""

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
    means, quats, scales, opacities, colors, viewmat, K = (
        np.asarray(a, np.float64) for a in (means, quats, scales, opacities, colors, viewmat, K)
    )
    channels = colors.shape[-1]
    color = np.zeros((height, width, channels))
    depth = np.zeros((height, width))
    transmittance = np.ones((height, width))
    ended = np.zeros((height, width), bool)
    fragile = np.zeros((height, width), bool)
    last_depth = np.full((height, width), -np.inf)

    points = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    for i in np.argsort(points[:, 2], kind="stable"):
        z = points[i, 2]
        if z < near:
            continue
        centre, covariance = _project(points[i], quats[i], scales[i], viewmat, K, width, height)
        blurred = covariance + 0.3 * np.eye(2)
        opacity = opacities[i]
        if antialiased:
            opacity *= np.sqrt(max(np.linalg.det(covariance), 0.0) / np.linalg.det(blurred))
        if not opacity * 255 > 1 - 1e-3:
            continue
        half = np.sqrt(2 * (np.log(255 * opacity) + 2e-3) * np.diag(blurred))
        low = np.clip(np.ceil(centre - half - 0.5), 0, [width, height]).astype(int)
        high = np.clip(np.floor(centre + half - 0.5) + 1, 0, [width, height]).astype(int)
        if np.any(high <= low):
            continue
        window = np.s_[low[1] : high[1], low[0] : high[0]]

        dx = np.arange(low[0], high[0]) + 0.5 - centre[0]
        dy = np.arange(low[1], high[1])[:, None] + 0.5 - centre[1]
        inverse = np.linalg.inv(blurred)
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
