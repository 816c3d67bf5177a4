"""Colours that depend on the direction of view: real spherical harmonics of degree 0 to 3.

The basis and its signs are those of 3D Gaussian Splatting (and of Plenoxels before it); a colour is
0.5 plus the sum over the basis, at least 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

SIZES = (1, 4, 9, 16)
"""Coefficients up to degree 0, 1, 2 and 3."""


def basis(directions: Float[Array, "*b 3"], size: int) -> Float[Array, "*b K"]:
    """The first `size` (one of `SIZES`) functions at unit vectors."""
    x, y, z = jnp.moveaxis(directions, -1, 0)
    values = [jnp.full_like(x, 0.28209479177387814)]
    if size > 1:
        values += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if size > 4:
        values += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if size > 9:
        values += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
            0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return jnp.stack(values, -1)


def shade(
    sh: Float[Array, "N K C"], means: Float[Array, "N 3"], viewmat: Float[Array, "4 4"]
) -> Float[Array, "N C"]:
    """Colours of Gaussians as a camera sees them, differentiable in all three.

    Args:
      sh: coefficients, K one of `SIZES`.
      means: centres in world units.
      viewmat: world to camera; the direction is from its centre, -R^T t, to each mean.
    """
    centre = -sum(viewmat[i, :3] * viewmat[i, 3] for i in range(3))
    offsets = means - centre
    length2 = jnp.sum(offsets * offsets, -1, keepdims=True)
    # A mean in the camera's centre has no direction, and is not drawn.
    directions = offsets / jnp.sqrt(jnp.where(length2 > 0, length2, 1.0))
    values = basis(directions, sh.shape[-2])
    return jnp.maximum(jnp.sum(values[..., None] * sh, -2) + 0.5, 0.0)
