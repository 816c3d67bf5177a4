"""Projection of 3D Gaussians to the image: EWA splatting, differentiable by JAX's own autodiff.

Every backend starts from the same `Splats`. A 2D Gaussian is handed on as the *Cholesky factor of
its conic* (the inverse of its 2D covariance): an upper triangular U with sigma(d) = |U d|^2 / 2 for
a pixel's offset d from the centre. Sigma from U doesn't cancel, so a splat a thousand pixels long
and one wide stays accurate in float32, where the three coefficients of the conic do not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels import cameras

BLUR = 0.3
"""Variance in pixels^2 that is added to every 2D covariance (3DGS's low-pass filter)."""

MAX_SCALE = 1e10
"""Larger scales are taken for this one, whose square float32 still holds in pixels."""

MIN_ALPHA = 1.0 / 255.0
MAX_ALPHA = 0.99
MIN_TRANSMITTANCE = 1e-4


class Splats(NamedTuple):
    """Gaussians as images see them: what `project` makes, and `blend` and every backend take.

    A Gaussian that must not be drawn (in front of the near plane) has opacity 0.
    Every field is finite where the scene is. The properties are computed when they are asked for.
    """

    means: Float[Array, "*b N 2"]
    """Centres in pixels, x right and y down; the centre of the first pixel is (0.5, 0.5)."""
    cholesky: Float[Array, "*b N 3"]
    """(p, q, r) of U = [[p, q], [0, r]], in 1/pixels: sigma = ((p dx + q dy)^2 + (r dy)^2) / 2."""
    opacities: Float[Array, "*b N"]
    """Those of the Gaussians, dimmed where the projection was antialiased."""
    depths: Float[Array, "*b N"]
    """z in camera space: what the splats are sorted by, and what `Render.depth` averages."""

    @property
    def conics(self) -> Float[Array, "*b N 3"]:
        """(a, b, c), in 1/pixels^2: sigma = (a dx^2 + c dy^2) / 2 + b dx dy, as in gsplat."""
        p, q, r = jnp.moveaxis(self.cholesky, -1, 0)
        return jnp.stack([p * p, p * q, q * q + r * r], -1)

    @property
    def radii(self) -> Float[Array, "*b N 2"]:
        """Half width and half height in pixels of what is drawn, the ellipse of alpha 1/255.

        0 where no pixel of any image would be; those off the image have theirs (see `visible`).
        """
        p, q, r = jnp.moveaxis(self.cholesky, -1, 0)
        # The covariance is U^-1 U^-T.
        deviations = jnp.stack([jnp.sqrt(1.0 + (q / r) ** 2) / p, 1.0 / r], -1)
        return jnp.sqrt(2.0 * self.reach)[..., None] * deviations

    def visible(self, width: int, height: int) -> Bool[Array, "*b N"]:
        """Whether a splat's bounding box has a pixel's centre of an image of that size in it.

        What other splats hide is visible in this sense.
        """
        radii, limit = self.radii, jnp.array([width, height], jnp.float32)
        lowest = jnp.maximum(jnp.ceil(self.means - radii - 0.5), 0.0)
        highest = jnp.minimum(jnp.floor(self.means + radii - 0.5), limit - 1.0)
        return (self.opacities >= MIN_ALPHA) & jnp.all(highest >= lowest, -1)

    @property
    def reach(self) -> Float[Array, "*b N"]:
        """The sigma at which alpha falls to 1/255; 0 where it is less everywhere."""
        drawn = self.opacities >= MIN_ALPHA
        return jnp.where(drawn, jnp.log(jnp.where(drawn, self.opacities, 1.0) / MIN_ALPHA), 0.0)


def project_image(
    means: Float[Array, "N 3"],
    quats: Float[Array, "N 4"],
    scales: Float[Array, "N 3"],
    opacities: Float[Array, "N"],
    viewmat: Float[Array, "4 4"],
    K: Float[Array, "3 3"],
    radial_coeffs: Float[Array, "R"],
    tangential_coeffs: Float[Array, "T"],
    *,
    camera_model: str,
    width: int,
    height: int,
    near: float,
    antialiased: bool,
) -> Splats:
    """Project the Gaussians of one image (`jax.vmap` for more).

    Args:
      means, scales: world units. `quats` are (w, x, y, z).
      viewmat: world to camera, OpenCV axes (x right, y down, z forward).
      K: intrinsics in pixels without skew: fx, fy, cx, cy are read.
      radial_coeffs, tangential_coeffs: see `cameras.distorted`; of length 0 without distortion.
      camera_model: one of `cameras.MODELS`.
      antialiased: scale the opacity by sqrt(det(cov) / det(cov + 0.3 I)), which keeps a splat
        smaller than a pixel from growing brighter (Mip-Splatting, Yu et al., CVPR 2024, eq. 9).

    Source: Zwicker et al., EWA Splatting (2001); Kerbl et al., 3D Gaussian Splatting (2023).
    """
    # Coordinates first and Gaussians last: everything below is arithmetic on vectors of N, which
    # compilers fuse, and whose precision doesn't depend on how a device multiplies matrices.
    means, quats, scales = means.T, quats.T, jnp.clip(scales.T, -MAX_SCALE, MAX_SCALE)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    x, y, depth = sum(viewmat[:3, j, None] * means[j] for j in range(3)) + viewmat[:3, 3, None]
    visible = depth >= near
    z = jnp.where(visible, depth, 1.0)

    rotations = _rotation_matrices(quats)
    axes = scales * sum(viewmat[:3, j, None, None] * rotations[j] for j in range(3))
    if camera_model == "ortho":
        plane = cameras.orthographic(x, y, axes)
    elif camera_model == "fisheye" or len(radial_coeffs) or len(tangential_coeffs):
        plane = cameras.distorted(
            x, y, z, axes, radial_coeffs, tangential_coeffs, fisheye=camera_model == "fisheye"
        )
    else:
        plane = cameras.perspective(x, y, z, axes, K, width, height)
    visible &= plane.seen

    # The 2D covariance is M M^T, with rows m0 and m1 [3, N] of M = J R_view R S.
    m0, m1 = fx * plane.axes_u, fy * plane.axes_v
    xx, xy, yy = jnp.sum(m0 * m0, 0), jnp.sum(m0 * m1, 0), jnp.sum(m1 * m1, 0)

    # det(M M^T) = |m0 x m1|^2 (Cauchy-Binet), which does not cancel as xx yy - xy^2 does.
    r = 1.0 / jnp.sqrt(yy + BLUR)
    across = m0 * r
    area2 = sum((across[i] * m1[j] - across[j] * m1[i]) ** 2 for i, j in ((0, 1), (1, 2), (2, 0)))
    variance = area2 + BLUR * (xx + yy + BLUR) * r * r
    # area2 is det(cov) / (yy + BLUR), and variance det(cov + BLUR I) / (yy + BLUR).
    p = 1.0 / jnp.sqrt(variance)
    q = -p * xy * r * r

    if antialiased:
        flat = area2 <= 0
        shrink = jnp.sqrt(jnp.where(flat, 1.0, area2)) * p
        opacities = opacities * jnp.where(flat, 0.0, shrink)
    return Splats(
        means=jnp.stack([fx * plane.u + cx, fy * plane.v + cy], -1),
        cholesky=jnp.stack([p, q, r], -1),
        opacities=jnp.where(visible, opacities, 0.0),
        depths=depth,
    )


def _rotation_matrices(quats: Float[Array, "4 N"]) -> Float[Array, "3 3 N"]:
    """Rotation matrices of quaternions (w, x, y, z), which are normalised first (0 stays 0)."""
    # Squares of the smallest and largest numbers leave float32's range.
    largest = jnp.max(jnp.abs(lax.stop_gradient(quats)), axis=0)
    quats = quats * jnp.where(largest > 1e15, 1e-20, jnp.where(largest < 1e-15, 1e20, 1.0))
    norm2 = jnp.sum(quats**2, axis=0)
    w, x, y, z = quats / jnp.sqrt(jnp.where(norm2 > 0, norm2, 1.0))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row) for row in rows])
