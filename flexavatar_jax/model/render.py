"""From a model's Gaussians and a camera in the head frame to an image."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flexavatar_jax.model.gaussians import Gaussians
from kernels import Render, rasterize

SH_C0 = 0.28209479
"""Degree-0 spherical harmonic: what turns a colour coefficient into RGB."""


def head2cam(cam2head: Float[ArrayLike, "*b 4 4"]) -> Float[Array, "*b 4 4"]:
    """Inverse of a rigid camera-to-head transform."""
    R = jnp.swapaxes(cam2head[..., :3, :3], -1, -2)
    t = -jnp.einsum("...ij,...j->...i", R, cam2head[..., :3, 3], precision=lax.Precision.HIGHEST)
    top = jnp.concatenate([R, t[..., None]], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], top.dtype), (*t.shape[:-1], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def render(
    gaussians: Gaussians,
    cam2head: Float[ArrayLike, "*b 4 4"],
    K: Float[ArrayLike, "*b 3 3"],
    background: Float[ArrayLike, "*b 3"],
    *,
    size: int,
    backend: str = "auto",
    capacity: int | None = None,
) -> Render:
    """Renders square images of `gaussians` ([*b, G, ...], one set an image).

    Args:
      gaussians: in the canonical head frame (metres); colours are degree-0 SH coefficients,
        rgb = max(0, 0.28209479 c + 0.5).
      cam2head: camera in the head frame, OpenCV axes.
      K: intrinsics divided by the image size.
      background: RGB in [0, 1].
      size: side of the images in pixels.
      backend, capacity: see `kernels.rasterize`.

    Returns:
      `kernels.Render`: color [*b, size, size, 3], alpha, depth, and the count of overflows.
    """
    return rasterize(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        jnp.maximum(SH_C0 * gaussians.colors + 0.5, 0.0),
        head2cam(cam2head),
        K * jnp.array([size, size, 1.0], K.dtype)[:, None],
        width=size,
        height=size,
        background=background,
        backend=backend,
        capacity=capacity,
        overflow="count",  # training logs it, rendering raises it
    )
