"""Where pixel losses look closer: the eyes, a hundredth of a picture and half of a face.

A mean over pixels hardly hears of an iris: two pixels of 4,096 in the demo's pictures. Points of
the head that `config.loss.focus` names are projected into each target, and pixels about them count
for more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def focus_weights(
    cam2head: Float[ArrayLike, "*b 4 4"],
    K: Float[ArrayLike, "*b 3 3"],
    size: int,
    focus: ml_collections.ConfigDict,
) -> Float[Array, "*b {size} {size}"]:
    """How much each pixel counts, 1 on an image's average: at the points up to 1 + `focus.weight`
    times as much as far from them.

    An image's mean is its own, so that losses don't depend on which images share a batch. A point's
    share falls off as a Gaussian of `focus.radius`, and with the cosine between the
    face's direction (+z of the head frame) and the camera's: from behind, nobody has a face.

    Args:
      cam2head: cameras in the head frame, metres, OpenCV axes.
      K: intrinsics divided by the image size.
      size: side of the pictures in pixels.
      focus: `config.loss.focus`: `weight`, `radius` in metres, `points` in the head frame, metres.
    """
    points = jnp.asarray(np.reshape(focus.points, (-1, 3)), jnp.float32)
    cam2head, K = jnp.asarray(cam2head), jnp.asarray(K)
    rotation, center = cam2head[..., :3, :3], cam2head[..., :3, 3]
    rays = points - center[..., None, :]
    local = jnp.einsum("...ki,...pk->...pi", rotation, rays, precision="highest")
    depth = jnp.maximum(local[..., 2], 1e-3)
    image = jnp.einsum("...ij,...pj->...pi", K, local, precision="highest")[..., :2]
    image = image / depth[..., None]
    facing = jnp.clip(-rays[..., 2] / jnp.linalg.norm(rays, axis=-1), 0, 1)
    facing = jnp.where(local[..., 2] > 1e-3, facing, 0)
    radius = focus.radius * K[..., 0, 0][..., None] / depth

    def near(at: Array) -> Array:
        """[..., points, size] along one axis of the picture; a Gaussian is the product of two."""
        pixels = (jnp.arange(size) + 0.5) / size
        return jnp.exp(-0.5 * ((pixels - at[..., None]) / radius[..., None]) ** 2)

    bumps = jnp.einsum("...ph,...pw,...p->...hw", near(image[..., 1]), near(image[..., 0]), facing)
    weights = 1 + focus.weight * bumps
    return jax.lax.stop_gradient(weights / jnp.mean(weights, axis=(-2, -1), keepdims=True))
