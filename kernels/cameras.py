"""Camera models: how a camera-space point and a Gaussian's axes come to lie on the image plane.

A model maps (x, y, z) to plane coordinates (u, v), which K scales and shifts to pixels; splatting
needs its Jacobian too. The distortions are OpenCV's (its documentation of `calib3d` and `fisheye`):
they bend the plane of x/z, y/z, and so change nothing but the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

MODELS = {"pinhole": 6, "ortho": 0, "fisheye": 4}
"""Camera models, by gsplat's names, and how many radial coefficients each may have."""

FRUSTUM_MARGIN = 0.3
"""The Jacobian is taken within the view frustum widened by this share of tan(fov/2)."""

FARTHEST = 1e8
"""Square of the largest x/z that is bent: 89.99 degrees from the axis; float32 still holds it."""
STEPS = 8
"""Where on the way from the axis to a point it is looked whether the distortion folds back."""


class Plane(NamedTuple):
    """Gaussians on the image plane, where a unit is K's focal length in pixels."""

    u: Float[Array, "N"]
    v: Float[Array, "N"]
    axes_u: Float[Array, "3 N"]
    """u and v of the Gaussian's three axes, by the Jacobian."""
    axes_v: Float[Array, "3 N"]
    seen: Bool[Array, "N"]
    """False where the model maps a point to a place that belongs to another."""


def orthographic(x: Array, y: Array, axes: Float[Array, "3 3 N"]) -> Plane:
    """No perspective: K's focal lengths are pixels to a world unit."""
    return Plane(x, y, axes[0], axes[1], jnp.ones(x.shape, bool))


def perspective(
    x: Array, y: Array, z: Array, axes: Float[Array, "3 3 N"], K: Array, width: int, height: int
) -> Plane:
    """A pinhole camera without distortion."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    u, v = x / z, y / z
    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    ju = jnp.clip(u, -cx / fx - margin_x, (width - cx) / fx + margin_x)
    jv = jnp.clip(v, -cy / fy - margin_y, (height - cy) / fy + margin_y)
    axes_u, axes_v = 1.0 / z * (axes[0] - ju * axes[2]), 1.0 / z * (axes[1] - jv * axes[2])
    return Plane(u, v, axes_u, axes_v, jnp.ones(u.shape, bool))


def distorted(
    x: Array,
    y: Array,
    z: Array,
    axes: Float[Array, "3 3 N"],
    radial: Float[Array, "R"],
    tangential: Float[Array, "T"],
    *,
    fisheye: bool,
) -> Plane:
    """A pinhole camera or an equidistant fisheye with OpenCV's coefficients.

    The Jacobian is taken where the Gaussian is: the frustum's edges are not known on the plane of
    x/z, y/z. Points behind the place where the radial distortion folds back are not seen.

    Args:
      radial: k1 to k6, or fewer; for a fisheye k1 to k4, or fewer.
      tangential: p1 and p2, or none.
    """
    u, v = x / z, y / z

    def factor(s):
        return _fisheye_factor(s, radial) if fisheye else _radial_factor(s, radial)

    seen = _is_unfolded(factor, lax.stop_gradient(u * u + v * v))
    u, v = jnp.where(seen, u, 0.0), jnp.where(seen, v, 0.0)
    s = u * u + v * v
    # g and dg/ds of (u, v) -> g (u, v)
    g, slope = jax.jvp(factor, (s,), (jnp.ones_like(s),))
    bent_u, bent_v = u * g, v * g
    uu, uv, vv = g + 2 * u * u * slope, 2 * u * v * slope, g + 2 * v * v * slope
    if len(tangential):
        p1, p2 = tangential
        bent_u = bent_u + 2 * p1 * u * v + p2 * (s + 2 * u * u)
        bent_v = bent_v + p1 * (s + 2 * v * v) + 2 * p2 * u * v
        uu = uu + 2 * p1 * v + 6 * p2 * u
        uv = uv + 2 * p1 * u + 2 * p2 * v
        vv = vv + 6 * p1 * v + 2 * p2 * u
    flat_u, flat_v = (axes[0] - u * axes[2]) / z, (axes[1] - v * axes[2]) / z
    return Plane(bent_u, bent_v, uu * flat_u + uv * flat_v, uv * flat_u + vv * flat_v, seen)


def _radial_factor(s: Array, k: Array) -> Array:
    """(1 + k1 s + k2 s^2 + k3 s^3) / (1 + k4 s + k5 s^2 + k6 s^3) of a radius squared, s."""
    above = jnp.ones_like(s) + sum(k[i] * s ** (i + 1) for i in range(min(3, len(k))))
    below = 1 + sum(k[i] * s ** (i - 2) for i in range(3, len(k)))
    return above / below


def _fisheye_factor(s: Array, k: Array) -> Array:
    """theta (1 + k1 theta^2 + ... + k4 theta^8) / r, with theta the angle from the axis."""
    near = s < 1e-2  # atan(r) / r by its series, whose derivatives do not cancel
    far = jnp.sqrt(jnp.where(near, 1.0, s))
    series = 1 - s * (1 / 3 - s * (1 / 5 - s * (1 / 7 - s * (1 / 9))))
    straight = jnp.where(near, series, jnp.arctan(far) / far)
    theta2 = s * straight * straight
    return straight * (1 + sum(k[i] * theta2 ** (i + 1) for i in range(len(k))))


def _is_unfolded(factor, s: Array) -> Bool[Array, "N"]:
    """Whether the distorted radius grows all the way from the axis to a point."""
    fine = s <= FARTHEST
    s = jnp.where(fine, s, 0.0)
    for step in range(1, STEPS + 1):
        along = s * (step / STEPS) ** 2
        g, slope = jax.jvp(factor, (along,), (jnp.ones_like(s),))
        fine &= (g + 2 * along * slope > 0) & (g > 0)
    return fine
